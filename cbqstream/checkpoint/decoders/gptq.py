"""Weights of GPTQ.

    NAME.qweight    I32 [I b / 32, O]    codes of b bits, without gaps along I
    NAME.qzeros     I32 [G, O b / 32]    zero points, without gaps along O; in `gptq` minus one, in `gptq_v2` as they are
    NAME.scales     F16 or BF16 [G, O]
    NAME.g_idx      I32 [I]              group of each column; groups follow each other if it is missing

The weight NAME.weight [O, I] is `(code - zero) * scale`, computed in the dtype of the scales as in GPTQModel. To zero points of `gptq`, one
is added to whole words, with carries between them, because GPTQModel subtracts it so; those of 3 bits are changed one by one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
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

_BITS = (2, 3, 4, 8)
_WORD = 32
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""Words in which every zero point is one."""
_VERSIONS = {"gptq": 1, "gptq_v2": 0}
"""Number that is added to stored zero points, by the `checkpoint_format`."""


@dataclass(frozen=True, slots=True)
class _Form:
    """Form of the codes of one weight."""

    bits: int
    offset: int
    dtype: torch.dtype
    """Dtype of the decoded weight."""


def _open(quantized: Quantized) -> MakeWeight:
    config = quantized.config
    version = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if version not in _VERSIONS or config.get("is_marlin_format"):
        found = "marlin" if config.get("is_marlin_format") else version
        raise not_read(quantized, f"its checkpoint_format {found!r} is not gptq or gptq_v2")
    if type(config.get("bits")) is not int or config["bits"] not in _BITS:
        raise not_read(quantized, f"its bits, {config.get('bits')!r}, are not 2, 3, 4 or 8")
    return partial(_weight, quantized, _VERSIONS[version])


def _weight(quantized: Quantized, offset: int, name: str, parts: Parts) -> DerivedTensor:
    codes = parts["qweight"]
    scales = require_part(name, parts, "scales", "qweight", "scales")
    zeros = require_part(name, parts, "qzeros", "qweight", "qzeros")
    for info in (codes, scales):
        if len(info.shape) != 2:
            raise InputError(info.file, f"has shape {list(info.shape)}, not two dimensions. {REPAIR}", tensor=info.name)
    words, rows = codes.shape
    groups = scales.shape[0]
    bits = int(quantized.config["bits"])
    if quantized.config.get("dynamic") and parts.get("g_idx") and parts["g_idx"].shape != (0,):
        bits = words * _WORD // math.prod(parts["g_idx"].shape)  # layers may have other bits than the model
    columns = words * _WORD // bits if bits else 0
    if bits not in _BITS or columns * bits != words * _WORD:
        problem = f"has shape {list(codes.shape)}, which does not hold codes of {bits} bits without gaps"
        raise InputError(codes.file, f"{problem}. {REPAIR}", tensor=codes.name)
    require_form(codes, ((words, rows),), ("I32",))
    require_form(scales, ((groups, rows),), ("F16", "BF16", "F32"))
    require_form(zeros, ((groups, -(-rows * bits // _WORD)),), ("I32",))
    kept = {"qweight": codes, "scales": scales, "qzeros": zeros}
    if "g_idx" in parts:
        require_form(parts["g_idx"], ((columns,),), ("I32", "I64"))
        kept["g_idx"] = parts["g_idx"]
    elif not groups or columns % groups:
        raise InputError(scales.file, f"has {groups} groups for {columns} columns. {REPAIR}", tensor=scales.name)
    return DerivedTensor(
        name, quantized.dtype, (rows, columns), kept, partial(_decoded, _Form(bits, offset, quantized.dtype))
    )


def _decoded(form: _Form, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight [O, I]."""
    bits, words, scales_GO = form.bits, parts["qweight"], parts["scales"]
    groups, rows = scales_GO.shape
    columns = words.shape[0] * _WORD // bits
    require_scales(scales_GO, zero=True)  # float16 has no smaller scale for a row of tiny weights
    half, most = 1 << (bits - 1), (1 << bits) - 1
    in_words = parts["qzeros"] + form.offset * _ONES.get(bits, 0)
    zeros_GO = unpack_from_int32(in_words, bits, torch.Size(scales_GO.shape)).short()
    if bits not in _ONES:
        zeros_GO = ((zeros_GO + half + form.offset) & most) - half
    group_I = parts["g_idx"].long() if "g_idx" in parts else torch.arange(columns) // (columns // groups)
    low, high = (int(value) for value in torch.aminmax(group_I))
    if low < 0 or high >= groups:
        raise ValueError(f"g_idx has the group {high if high >= groups else low}, but there are {groups}")

    def columns_of(slab: slice) -> Tensor:
        held = words[slab.start * bits // _WORD : slab.stop * bits // _WORD]
        codes = unpack_from_int32(held, bits, torch.Size((slab.stop - slab.start, rows)), packed_dim=0).short()
        group = group_I[slab]
        values: Tensor = scales_GO[group] * (codes - zeros_GO[group])
        return values

    return by_columns((rows, columns), form.dtype, _WORD, columns_of)  # 32 codes fill whole words


GPTQ = Decoder(
    codes="qweight",
    ends={f".{part}": (".weight", part) for part in ("qweight", "qzeros", "scales", "g_idx")},
    open=_open,
)
"""Weights of `gptq`."""
