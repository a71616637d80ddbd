"""The layout of the format `pack-quantized` of compressed-tensors, for weights of every scheme.

compressed-tensors defines names and bit layout, and its functions pack and unpack here.

    NAME.weight_packed      int32 [O, ceil(I * num_bits / 32)]           codes + 2^(num_bits - 1), without gaps along the row
    NAME.weight_zero_point  int32 [ceil(O * num_bits / 32), G]           if asymmetric; packed along dimension 0
    NAME.weight_shape       int64 [2]                                    O and I

Scales are in `layout.py`.
"""

import sys
from collections.abc import Mapping

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.tensors import TensorInfo
from cbqstream.packed.layout import SCALE, ZERO_POINT, Layout, Part, groups_of, scales_of
from cbqstream.records import QuantizedWeight
from cbqstream.scheme import Scheme

SHAPE = "weight_shape"
_BYTE, _WORD = 8, 32
_SLAB_ROWS = 128 * _WORD  # a multiple of 32, so that the zero points of every slab but the last fill whole words


class PackQuantized(Layout):
    """Layout of `pack-quantized`."""

    __slots__ = ()

    format = "pack-quantized"
    codes = "weight_packed"
    others = (SCALE, SHAPE)

    @override
    def is_for(self, scheme: Scheme) -> bool:
        return True

    @override
    def can_hold(self, scheme: Scheme) -> bool:
        return True

    @override
    def warning(self, scheme: Scheme) -> str | None:
        if (scheme.num_bits, scheme.activation_bits) != (8, 8) or scheme.group_size is None:
            return None
        return (
            f"W8A8 in groups of {scheme.group_size} is stored as {self.format}, which few engines compute: by their code, vLLM 0.32"
            " on CUDA with inputs scaled per token, and SGLang 0.5 without quantizing inputs. Use --group-size -1."
        )

    @override
    def is_in(self, infos: Mapping[str, TensorInfo], layer: str) -> bool:
        return f"{layer}.{self.codes}" in infos

    @override
    def weight_shape(self, checkpoint: Checkpoint, layer: str) -> tuple[int, int]:
        name = f"{layer}.{SHAPE}"
        if name not in checkpoint.infos:
            raise ValueError(f"{SHAPE} missing")
        if checkpoint.infos[name].shape != (2,):
            raise ValueError(f"{SHAPE} is not two numbers")
        rows, columns = checkpoint.read(name, device=torch.device("cpu")).tolist()
        return int(rows), int(columns)

    @override
    def parts(self, scheme: Scheme, rows: int, columns: int) -> dict[str, Part]:
        groups = groups_of(scheme, columns)
        parts = {
            self.codes: Part((rows, _words(columns, scheme)), torch.int32),
            SCALE: Part((rows, groups)),
            SHAPE: Part((2,)),
        }
        return parts if scheme.symmetric else {**parts, ZERO_POINT: Part((_words(rows, scheme), groups), torch.int32)}

    @override
    def encode(self, weight: QuantizedWeight, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        # packing a head of a billion weights at once would take many times its size
        slabs = [
            self._packed_rows(weight.rows(slice(start, start + _SLAB_ROWS)))
            for start in range(0, weight.codes.shape[0], _SLAB_ROWS)
        ]
        packed = {part: torch.cat([slab[part] for slab in slabs]) for part in slabs[0]}
        shape = torch.tensor(weight.codes.shape, dtype=torch.int64)
        return {**packed, **scales_of(weight, scale_dtype), SHAPE: shape}

    def _packed_rows(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        bits = weight.scheme.num_bits
        packed = {self.codes: _packed(weight.codes, bits)}
        if weight.zero_point is not None:
            packed[ZERO_POINT] = pack_to_int32(weight.zero_point.cpu(), bits, packed_dim=0).contiguous()
        return packed

    @override
    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        rows, columns = tensors[SHAPE].tolist()
        packed = tensors[self.codes]
        codes = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
        for start in range(0, rows, _SLAB_ROWS):  # unpacking at once takes up to eight times the size of the codes
            slab = codes[start : start + _SLAB_ROWS]
            slab.copy_(unpack_from_int32(packed[start : start + _SLAB_ROWS], scheme.num_bits, slab.shape))
        scale = tensors[SCALE].float()
        zero_point = None
        if not scheme.symmetric:
            zero_point = unpack_from_int32(tensors[ZERO_POINT], scheme.num_bits, scale.shape, packed_dim=0)
        return QuantizedWeight(codes, scale, zero_point, scheme)


def _packed(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes as int32 [O, ceil(I * bits / 32)] on the CPU.

    Codes of 2, 4 and 8 bits fill whole bytes, and are packed where they are, in a seventh of the time of `pack_to_int32`.
    """
    if _BYTE % bits or sys.byteorder != "little":
        by_library: Tensor = pack_to_int32(codes_OI.cpu(), bits)
        return by_library
    packed = codes_OI.contiguous().view(torch.uint8) + (1 << (bits - 1))  # modulo 256
    if missing := -codes_OI.shape[1] % (_WORD // bits):
        packed = functional.pad(packed, (0, missing))
    while bits < _BYTE:  # two neighboring bytes become one
        packed, bits = torch.add(packed[:, 0::2], packed[:, 1::2], alpha=1 << bits), 2 * bits
    return packed.cpu().view(torch.int32)


def _words(codes: int, scheme: Scheme) -> int:
    return -(-codes * scheme.num_bits // _WORD)
