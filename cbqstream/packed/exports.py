"""Formats to which a quantized layer is exported: tensors of the layer, schemes that are supported, and the quantization_config.

I is the number of inputs of a layer, O of outputs, G of groups in a row, and b of bits of a code. `gptq`, `gptq_v2` and `awq` keep every
code. They store codes and zero points unsigned, `u = q + 2^(b-1)`.

    format    tensor     dtype and shape              content
    dense     weight     dtype of the scales [O, I]   (q - z) s, rounded to that dtype

    gptq      qweight    int32 [I b/32, O]            32/b codes in each word along I, the first in the lowest bits
              qzeros     int32 [G, O b/32]            zero points minus one, packed in the same way along O
              scales     float16 [G, O]               scales
              g_idx      int32 [I]                    group of each column

    gptq_v2   as gptq                                 zero points without the minus one

    awq       qweight    int32 [I, O/8]               eight codes in each word along O, in the order 0 2 4 6 1 3 5 7
              qzeros     int32 [G, O/8]               zero points, packed in the same way
              scales     float16 [G, O]               scales

GPTQModel and vLLM read `gptq`. `awq` is the version "gemm" of AutoAWQ.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from cbqstream.errors import UsageError
from cbqstream.numerics.affine import dequantize, unsigned
from cbqstream.packed.gguf_blocks import cannot_gguf, exact_half
from cbqstream.records import QuantizedWeight
from cbqstream.scheme import LayerSchemes, Scheme

DENSE = "dense"
"""Name of the format without quantization."""
_WORD = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_GROUPS = (16, 32, 64, 128)
_GPTQ_GROUPS = (*_AWQ_GROUPS, 256, 512, 1024, None)
"""Group sizes for which GPTQModel has kernels; None is one scale per channel."""


@dataclass(frozen=True, slots=True)
class ExportFormat:
    """A format to which quantized layers can be exported, and that is stored as shards of tensors."""

    encode: Callable[[QuantizedWeight, torch.dtype], dict[str, Tensor]]
    """Gives the stored tensors of a layer, by the last part of their name.

    The arguments are the quantized weight and the dtype of the layer's scales in the checkpoint.
    """
    cannot: Callable[[Scheme], str | None]
    """Gives the reason why the format cannot represent a scheme exactly, or None."""
    fills: Callable[[int], tuple[int, int]]
    """Gives the numbers that must divide the rows and the columns of a weight, from the width of its codes in bits."""
    config: Callable[[Scheme, Sequence[str], Sequence[str]], dict[str, Any] | None]
    """Gives the quantization_config of config.json, or None for a config.json without one.

    The arguments are the scheme, the paths of the modules that are not quantized, and the paths of the quantized modules.
    """
    only_blocks: bool = True
    """Whether programs that read the format expect quantized layers in the blocks only, so that a quantized head is not supported."""


def pack_words(values: Tensor, num_bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Pack groups of 32/b unsigned values into words of 32 bits, along the last dimension.

    Args:
        values: unsigned integers [..., N] of b bits.
        num_bits: b, the number of bits of a value.
        order: positions of the values in a word: value `order[j]` of each group occupies the bits from `j b` on. None is ascending order.

    Returns:
        The words, int32 [..., N b/32].
    """
    per_word = _WORD // num_bits
    words = values.to(torch.int64).reshape(*values.shape[:-1], -1, per_word)
    packed = torch.zeros(words.shape[:-1], dtype=torch.int64)
    for position, source in enumerate(order or range(per_word)):
        packed |= words[..., source] << (position * num_bits)
    return torch.where(packed >= 1 << (_WORD - 1), packed - (1 << _WORD), packed).to(torch.int32)


def _half(scale_OG: Tensor) -> Tensor:
    return exact_half(scale_OG).T.contiguous()


def _dense(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": dequantize(weight).to(dtype)}


def _gptq(weight: QuantizedWeight, offset: int) -> dict[str, Tensor]:
    bits, columns, (codes, zero_points) = weight.scheme.num_bits, weight.codes.shape[1], unsigned(weight)
    return {
        "qweight": pack_words(codes, bits).T.contiguous(),
        "qzeros": pack_words((zero_points - offset).T, bits).contiguous(),
        "scales": _half(weight.scale),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // weight.scale.shape[1]),
    }


def _awq(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    bits, (codes, zero_points) = weight.scheme.num_bits, unsigned(weight)
    return {
        "qweight": pack_words(codes.T, bits, _AWQ_ORDER).contiguous(),
        "qzeros": pack_words(zero_points.T, bits, _AWQ_ORDER).contiguous(),
        "scales": _half(weight.scale),
    }


def _cannot_gptq(scheme: Scheme) -> str | None:
    if scheme.activation_bits is not None:
        return f"inputs of {scheme.activation_bits} bits"
    if not scheme.symmetric:
        return "zero points other than the middle code"
    if scheme.num_bits not in (4, 8):
        return f"{scheme.num_bits} bits (4 and 8 are supported)"
    return _unknown_groups(scheme, _GPTQ_GROUPS)


def _cannot_awq(scheme: Scheme) -> str | None:
    if scheme.activation_bits is not None:
        return f"inputs of {scheme.activation_bits} bits"
    if scheme.group_size is None:
        return "one scale per channel"
    if scheme.num_bits != 4:
        return f"{scheme.num_bits} bits (4 is supported)"
    return _unknown_groups(scheme, _AWQ_GROUPS)


def _unknown_groups(scheme: Scheme, known: Sequence[int | None]) -> str | None:
    """Reason why programs that read the format do not support the group size of a scheme, or None."""
    if scheme.group_size in known:
        return None
    return f"groups of {scheme.group_size} ({', '.join(str(size) for size in known if size)} are supported)"


def _whole_words(num_bits: int) -> tuple[int, int]:
    return _WORD // num_bits, _WORD // num_bits


def _gptq_config(version: str) -> Callable[[Scheme, Sequence[str], Sequence[str]], dict[str, Any]]:
    def config(scheme: Scheme, not_quantized: Sequence[str], quantized: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": scheme.num_bits,
            "group_size": -1 if scheme.group_size is None else scheme.group_size,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": version,
            "dynamic": {f"-:^{re.escape(path)}$": {} for path in not_quantized},  # read by GPTQModel and vLLM
            "modules_in_block_to_quantize": [list(quantized)],  # read by transformers, which ignores `dynamic`
        }

    return config


def _awq_config(scheme: Scheme, not_quantized: Sequence[str], quantized: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": scheme.num_bits,
        "group_size": scheme.group_size,
        "zero_point": True,
        "modules_to_not_convert": list(not_quantized),
    }


EXPORTS: Mapping[str, ExportFormat] = MappingProxyType(
    {
        DENSE: ExportFormat(
            _dense, lambda scheme: None, lambda bits: (1, 1), lambda scheme, *paths: None, only_blocks=False
        ),
        "gptq": ExportFormat(lambda weight, dtype: _gptq(weight, 1), _cannot_gptq, _whole_words, _gptq_config("gptq")),
        "gptq_v2": ExportFormat(
            lambda weight, dtype: _gptq(weight, 0), _cannot_gptq, _whole_words, _gptq_config("gptq_v2")
        ),
        "awq": ExportFormat(_awq, _cannot_awq, lambda bits: (_WORD // bits, 1), _awq_config),
    }
)
"""Formats that are stored as shards of tensors, by their name for `cbqstream export --format`."""

GGUF = "gguf"
"""Name of the format that is stored as one file; see `gguf_file.py`."""
_CANNOT = {**{name: made.cannot for name, made in EXPORTS.items()}, GGUF: cannot_gguf}


def require_whole_words(name: str, layer: str, shape: Sequence[int], scheme: Scheme) -> None:
    """Check that the codes of a layer fill whole words in a format.

    Args:
        name: name of the format in `EXPORTS`.
        layer: path of the layer, for the message.
        shape: [O, I] of its weight.
        scheme: scheme of the layer.

    Raises:
        UsageError: the number of rows or columns is not a multiple that the format needs.
    """
    for length, multiple, side in zip(shape, EXPORTS[name].fills(scheme.num_bits), ("rows", "columns"), strict=True):
        if length % multiple:
            raise UsageError(
                f"format {name} needs a multiple of {multiple} {side}, but {layer} has {length}. Use --format dense."
            )


def require_exact(name: str, schemes: LayerSchemes) -> None:
    """Check that a format can represent the schemes of a model exactly; `dense` is accepted although it rounds the weights.

    Args:
        name: name of the format, as `cbqstream export --format` takes it.
        schemes: schemes of the layers of the model.

    Raises:
        UsageError: the format does not exist, or cannot represent the schemes; the message then names the formats that can.
    """
    if name not in _CANNOT:
        raise UsageError(f"format {name!r} is not supported. Use {', '.join(_CANNOT)}.")
    reason = _why_not(name, schemes)
    if reason is not None:
        able = [other for other in _CANNOT if other != DENSE and _why_not(other, schemes) is None]
        can = f"Formats that can: {', '.join(able)}" if able else "No other format can"
        raise UsageError(f"format {name} cannot represent {reason} exactly. {can}; dense rounds the weights.")


def _why_not(name: str, schemes: LayerSchemes) -> str | None:
    if any(scheme != schemes.default for _, scheme in schemes.others) and name not in (DENSE, GGUF):
        return "layers with different schemes"
    reasons = [_CANNOT[name](scheme) for scheme in (schemes.default, *(scheme for _, scheme in schemes.others))]
    return next((reason for reason in reasons if reason is not None), None)
