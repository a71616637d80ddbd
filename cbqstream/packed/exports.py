"""Other formats of a quantized layer, code for code: what each stores, what it cannot hold, and what config.json says of it.

I inputs, O outputs, G groups. Codes and zero points are unsigned in all of them: `u = q + 2^(b-1)`.

    dense     weight     dtype of the scales [O, I]                 (q - z) s, rounded to that dtype

    gptq      qweight    int32 [I b/32, O]      32/b codes a word along I, the first in the lowest bits      (GPTQModel, vLLM)
              qzeros     int32 [G, O b/32]      the same along O; minus one in `gptq`, as they are in `gptq_v2`
              scales     float16 [G, O]
              g_idx      int32 [I]              group of each column

    awq       qweight    int32 [I, O/8]         eight codes a word along O, in the order 0 2 4 6 1 3 5 7     (AutoAWQ "gemm")
              qzeros     int32 [G, O/8]         the same
              scales     float16 [G, O]
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

_WORD = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_GROUPS = (16, 32, 64, 128)
_GPTQ_GROUPS = (*_AWQ_GROUPS, 256, 512, 1024, None)
"""Columns that share a scale, for which GPTQModel has kernels."""


@dataclass(frozen=True, slots=True)
class ExportFormat:
    """A format that quantized layers can be written in."""

    encode: Callable[[QuantizedWeight, torch.dtype], dict[str, Tensor]]
    """Stored tensors of a layer by the last part of their name; the dtype is that of the layer's scales in the checkpoint."""
    cannot: Callable[[Scheme], str | None]
    """Why a scheme cannot be held exactly, or None."""
    fills: Callable[[int], tuple[int, int]]
    """Of what rows and columns must be multiples, for weights of some bits."""
    config: Callable[[Scheme, Sequence[str], Sequence[str]], dict[str, Any] | None]
    """quantization_config, of the scheme and the paths of modules that are not quantized, and of those that are; None is no entry."""
    only_blocks: bool = True
    """Whether readers look for quantized layers in the blocks alone: a quantized head would not be found."""


def pack_words(values: Tensor, num_bits: int, order: Sequence[int] | None = None) -> Tensor:
    """32/b unsigned values a word along the last dimension, int32 [..., N b/32]; value `order[j]` of a word has its bits from `j b` on."""
    per_word = _WORD // num_bits
    words = values.to(torch.int64).reshape(*values.shape[:-1], -1, per_word)
    packed = torch.zeros(words.shape[:-1], dtype=torch.int64)
    for place, source in enumerate(order or range(per_word)):
        packed |= words[..., source] << (place * num_bits)
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
        return "zero points (readers take the middle)"
    if scheme.num_bits not in (4, 8):
        return f"{scheme.num_bits} bits (4 and 8 can)"
    return _unknown_groups(scheme, _GPTQ_GROUPS)


def _cannot_awq(scheme: Scheme) -> str | None:
    if scheme.activation_bits is not None:
        return f"inputs of {scheme.activation_bits} bits"
    if scheme.group_size is None:
        return "one scale per channel"
    if scheme.num_bits != 4:
        return f"{scheme.num_bits} bits (4 can)"
    return _unknown_groups(scheme, _AWQ_GROUPS)


def _unknown_groups(scheme: Scheme, known: Sequence[int | None]) -> str | None:
    """A reader takes only some sizes of groups."""
    if scheme.group_size in known:
        return None
    return f"groups of {scheme.group_size} ({', '.join(str(size) for size in known if size)} can)"


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
            "dynamic": {f"-:^{re.escape(path)}$": {} for path in not_quantized},  # for GPTQModel and vLLM
            "modules_in_block_to_quantize": [list(quantized)],  # for transformers, which knows nothing of `dynamic`
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
        "dense": ExportFormat(
            _dense, lambda scheme: None, lambda bits: (1, 1), lambda scheme, *paths: None, only_blocks=False
        ),
        "gptq": ExportFormat(lambda weight, dtype: _gptq(weight, 1), _cannot_gptq, _whole_words, _gptq_config("gptq")),
        "gptq_v2": ExportFormat(
            lambda weight, dtype: _gptq(weight, 0), _cannot_gptq, _whole_words, _gptq_config("gptq_v2")
        ),
        "awq": ExportFormat(_awq, _cannot_awq, lambda bits: (_WORD // bits, 1), _awq_config),
    }
)
"""By the name that `cbqstream export --format` takes: formats that are shards of tensors."""

GGUF = "gguf"
_CANNOT = {**{name: made.cannot for name, made in EXPORTS.items()}, GGUF: cannot_gguf}


def require_whole_words(name: str, layer: str, shape: Sequence[int], scheme: Scheme) -> None:
    """Refuse a layer [O, I] whose codes leave a part of a word empty.

    Raises:
        UsageError: they do.
    """
    for length, multiple, what in zip(shape, EXPORTS[name].fills(scheme.num_bits), ("rows", "columns"), strict=True):
        if length % multiple:
            raise UsageError(f"format {name} needs multiples of {multiple} {what}, {layer} has {length}. Use dense.")


def require_exact(name: str, schemes: LayerSchemes) -> None:
    """Refuse what a format cannot hold.

    Raises:
        UsageError: it cannot; the message names the formats that can.
    """
    if name not in _CANNOT:
        raise UsageError(f"format {name!r} is not {', '.join(_CANNOT)}.")
    reason = _why_not(name, schemes)
    if reason is not None:
        able = [other for other in _CANNOT if other != "dense" and _why_not(other, schemes) is None]
        can = f"Formats that can: {', '.join(able)}" if able else "No format but OUT's own can"
        raise UsageError(f"format {name} cannot hold {reason} exactly. {can}; dense rounds the weights.")


def _why_not(name: str, schemes: LayerSchemes) -> str | None:
    if any(scheme != schemes.default for _, scheme in schemes.others) and name not in ("dense", GGUF):
        return "layers of different widths"
    reasons = [_CANNOT[name](scheme) for scheme in (schemes.default, *(scheme for _, scheme in schemes.others))]
    return next((reason for reason in reasons if reason is not None), None)
