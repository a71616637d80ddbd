"""Quantized weights as blocks of GGUF, with every code kept.

The layouts are those of ggml-quants in llama.cpp; `gguf.quants` of the gguf package decodes them in the same way. Each row of a weight is a
row of blocks. u are unsigned codes, q signed codes, s is a scale and z an unsigned zero point. d and dmin are fields of a block.

    type   width         content of a block                                                     decoded weight
    Q4_0   32 columns    d = s; nibbles u, columns 0-15 low, 16-31 high                         d (u - 8)
    Q8_0   32 columns    d = s; bytes q                                                         d q
    Q4_K   256 columns   d = dmin = s; 8 sub-blocks of scale 1 and minimum z; nibbles u         d u - dmin z
    Q2_K   256 columns   d = dmin = s; 16 sub-blocks of scale 1 and minimum z; 2 bits u         d u - dmin z
    Q3_K   256 columns   d = s; 16 sub-blocks of scale 33 - 32; 2 bits u, and a mask of u >> 2  d (u - 4)
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from cbqstream.errors import UsageError
from cbqstream.numerics.affine import unsigned
from cbqstream.records import QuantizedWeight
from cbqstream.scheme import Scheme

_SMALL, _LARGE = 32, 256
"""Numbers of columns of a block."""


def exact_half(scale: Tensor) -> Tensor:
    """Scales converted to float16 without a change of value.

    Scales of this project have 8 significant bits and are at least 2^-17 (`numerics/affine.py`), so the conversion is exact.

    Raises:
        UsageError: the conversion changes a value, because another program made the scales.
    """
    half = scale.to(torch.float16)
    if not torch.equal(half.float(), scale.float()):
        raise UsageError("the format stores scales in float16, which would round them. Use --format dense.")
    return half


def _parts(weight: QuantizedWeight, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of a weight, all uint8: u [O, N, columns], the two bytes of s [O, N, 2] and z [O, N, 1], for N blocks in a row."""
    rows, width = weight.codes.shape
    blocks = width // columns
    repeats = blocks // weight.scale.shape[1]
    codes, zero_points = unsigned(weight)
    u = codes.to(torch.uint8).view(rows, blocks, columns)
    d = exact_half(weight.scale).repeat_interleave(repeats, 1).contiguous().unsqueeze(-1).view(torch.uint8)
    z = zero_points.to(torch.uint8).repeat_interleave(repeats, 1).unsqueeze(-1)
    return u, d, z


def _nibbles(low: Tensor, high: Tensor) -> Tensor:
    return low | (high << 4)


def _merged(parts: Tensor, width: int) -> Tensor:
    """Bytes [..., C] that each combine P values of `width` bits from `parts` [..., P, C], the first in the lowest bits."""
    shifts = width * torch.arange(parts.shape[-2]).unsqueeze(-1)
    return (parts.long() << shifts).sum(-2).to(torch.uint8)


def _two_bits(u: Tensor) -> Tensor:
    """Bytes [O, N, 64] with the lowest two bits of 256 columns; a byte combines columns j, j + 32, j + 64 and j + 96 of one half."""
    return _merged((u & 3).reshape(*u.shape[:-1], 2, 4, _SMALL), 2).flatten(-2)


def _q4_0(weight: QuantizedWeight) -> Tensor:
    u, d, _ = _parts(weight, _SMALL)
    return torch.cat([d, _nibbles(*u.chunk(2, dim=-1))], dim=-1)


def _q8_0(weight: QuantizedWeight) -> Tensor:
    u, d, _ = _parts(weight, _SMALL)
    return torch.cat([d, u ^ 0x80], dim=-1)  # two's complement of q


def _q4_k(weight: QuantizedWeight) -> Tensor:
    u, d, z = _parts(weight, _LARGE)
    pairs = u.reshape(*u.shape[:-1], 4, 2, _SMALL)
    four = z.expand(*z.shape[:-1], 4)
    scales = torch.cat([torch.ones_like(four), four, _nibbles(torch.ones_like(four), four)], dim=-1)
    return torch.cat([d, d, scales, _nibbles(pairs[..., 0, :], pairs[..., 1, :]).flatten(-2)], dim=-1)


def _q2_k(weight: QuantizedWeight) -> Tensor:
    u, d, z = _parts(weight, _LARGE)
    sixteen = z.expand(*z.shape[:-1], 16)
    return torch.cat([_nibbles(torch.ones_like(sixteen), sixteen), _two_bits(u), d, d], dim=-1)


def _q3_k(weight: QuantizedWeight) -> Tensor:
    u, d, _ = _parts(weight, _LARGE)
    mask = _merged((u >> 2).reshape(*u.shape[:-1], 8, _SMALL), 1)
    # the low and high bits of the scale 33 = 1 + 16 * 2, for sixteen sub-blocks
    low, high = torch.full_like(u[..., :8], 0x11), torch.full_like(u[..., :4], 0xAA)
    return torch.cat([mask, _two_bits(u), low, high, d], dim=-1)


_KINDS: Mapping[tuple[int, bool], tuple[str, int, Callable[[QuantizedWeight], Tensor]]] = MappingProxyType(
    {
        (4, True): ("Q4_0", _SMALL, _q4_0),
        (8, True): ("Q8_0", _SMALL, _q8_0),
        (4, False): ("Q4_K", _LARGE, _q4_k),
        (3, True): ("Q3_K", _LARGE, _q3_k),
        (2, True): ("Q2_K", _LARGE, _q2_k),
        (2, False): ("Q2_K", _LARGE, _q2_k),
    }
)
"""Name of the block type, columns of a block and function that makes the blocks, by width and whether the scheme is symmetric."""


def cannot_gguf(scheme: Scheme) -> str | None:
    """Reason why GGUF cannot represent a scheme exactly, or None."""
    if scheme.activation_bits is not None:
        return f"inputs of {scheme.activation_bits} bits"
    kind = _KINDS.get((scheme.num_bits, scheme.symmetric))
    if kind is None:
        return f"{scheme.num_bits} bits {'without' if scheme.symmetric else 'with'} zero points"
    if scheme.group_size is not None and scheme.group_size % kind[1]:
        return f"groups of {scheme.group_size} ({kind[0]} supports multiples of {kind[1]}, or one scale per channel)"
    return None


def block_kind(scheme: Scheme) -> tuple[str, int]:
    """Name of the block type of a scheme that GGUF can represent, and number of columns of a block."""
    name, columns, _ = _KINDS[scheme.num_bits, scheme.symmetric]
    return name, columns


def encode_blocks(weight: QuantizedWeight) -> Tensor:
    """Blocks of a weight whose scheme GGUF can represent, uint8 [O, bytes of a row].

    Raises:
        UsageError: float16 cannot represent a scale exactly.
    """
    _, _, encode = _KINDS[weight.scheme.num_bits, weight.scheme.symmetric]
    return encode(weight).flatten(1)
