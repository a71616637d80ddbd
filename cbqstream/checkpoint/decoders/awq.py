"""Weights of AWQ, in the version "gemm".

    NAME.qweight    I32 [I, O / 8]    codes of 4 bits, eight in a word along O, in the order 0 2 4 6 1 3 5 7
    NAME.qzeros     I32 [G, O / 8]    zero points, packed in the same way; none if `zero_point` is false
    NAME.scales     F16 or BF16 [G, O]

The weight NAME.weight [O, I] is `(code - zero) * scale`, computed in the dtype of the scales as in `AutoAWQConverter` of
compressed-tensors. Without zero points, zero is 8.
"""

from collections.abc import Mapping
from functools import partial

import torch
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from torch import Tensor

from cbqstream.checkpoint.decoders.decoder import (
    REPAIR,
    Decoder,
    MakeWeight,
    Parts,
    Quantized,
    by_columns,
    not_read,
    require_form,
    require_part,
    require_scales,
)
from cbqstream.checkpoint.tensors import DerivedTensor
from cbqstream.errors import InputError

_BITS, _IN_WORD, _ZERO = 4, 8, 8


def _open(quantized: Quantized) -> MakeWeight:
    config = quantized.config
    bits = config.get("bits", config.get("w_bit"))
    if bits != _BITS:
        raise not_read(quantized, f"its bits, {bits!r}, are not 4")
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise not_read(quantized, f"its version {version!r} is not gemm")
    zero_point = config.get("zero_point", True)
    if not isinstance(zero_point, bool):
        raise not_read(quantized, f"its zero_point, {zero_point!r}, is neither true nor false")
    return partial(_weight, quantized, zero_point)


def _weight(quantized: Quantized, zero_point: bool, name: str, parts: Parts) -> DerivedTensor:  # noqa: FBT001
    codes = parts["qweight"]
    scales = require_part(name, parts, "scales", "qweight", "scales")
    if len(codes.shape) != 2:
        raise InputError(codes.file, f"has shape {list(codes.shape)}, not two dimensions. {REPAIR}", tensor=codes.name)
    columns, rows = codes.shape[0], _IN_WORD * codes.shape[1]
    groups = scales.shape[0] if scales.shape else 0
    require_form(codes, (codes.shape,), ("I32",))
    require_form(scales, ((groups, rows),), ("F16", "BF16", "F32"))
    if not groups or columns % groups:
        raise InputError(scales.file, f"has {groups} groups for {columns} columns. {REPAIR}", tensor=scales.name)
    kept = {"qweight": codes, "scales": scales}
    if zero_point:
        kept["qzeros"] = require_part(name, parts, "qzeros", "qweight", "qzeros")
        require_form(kept["qzeros"], ((groups, codes.shape[1]),), ("I32",))
    return DerivedTensor(name, quantized.dtype, (rows, columns), kept, partial(_decoded, quantized.dtype))


def _decoded(dtype: torch.dtype, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight [O, I]."""
    words, scales_GO = parts["qweight"], parts["scales"]
    columns, (groups, rows) = words.shape[0], scales_GO.shape
    require_scales(scales_GO, zero=True)  # float16 has no smaller scale for a row of tiny weights
    zeros_GO = _unpacked(parts["qzeros"]) if "qzeros" in parts else torch.full((groups, rows), _ZERO, dtype=torch.int8)

    def columns_of(slab: slice) -> Tensor:
        group = torch.arange(slab.start, slab.stop) // (columns // groups)
        return (_unpacked(words[slab]) - zeros_GO[group]) * scales_GO[group]

    return by_columns((rows, columns), dtype, 1, columns_of)


def _unpacked(words: Tensor) -> Tensor:
    """Codes from 0 to 15, int8 [N, O], of words int32 [N, O / 8]."""
    codes, _ = AutoAWQConverter.unpack_awq(words, None, _BITS)
    ordered, _ = AutoAWQConverter.reverse_awq_order(codes, None, _BITS)
    return torch.bitwise_and(ordered, 15)


AWQ = Decoder(
    codes="qweight", ends={f".{part}": (".weight", part) for part in ("qweight", "qzeros", "scales")}, open=_open
)
"""Weights of `awq`."""
