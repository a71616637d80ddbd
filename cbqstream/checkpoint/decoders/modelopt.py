"""Weights of ModelOpt: NVFP4 and FP8.

    NVFP4   NAME.weight            U8 [O, I / 2]           two FP4 codes (e2m1) in a byte, the first in the low bits
            NAME.weight_scale      F8_E4M3 [O, I / 16]     scale of each group of 16, divided by that of the tensor
            NAME.weight_scale_2    F32 [] or [1]           scale of the tensor

    FP8     NAME.weight            F8_E4M3 [O, I]
            NAME.weight_scale      see `fp8.py`

NVFP4 is decoded by compressed-tensors, after the conversion of `ModelOptNvfp4Converter`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from compressed_tensors.compressors import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import NVFP4
from torch import Tensor

from cbqstream.checkpoint.decoders.decoder import (
    REPAIR,
    Decoder,
    MakeWeight,
    Parts,
    Quantized,
    by_rows,
    float8,
    not_read,
    require_form,
    require_part,
    require_scales,
)
from cbqstream.checkpoint.decoders.fp8 import fp8_weight
from cbqstream.checkpoint.tensors import DerivedTensor
from cbqstream.errors import InputError

_ALGORITHMS = ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION", "MXFP8", "NVFP4", "W4A16_NVFP4")
_GROUP = 16


def _open(quantized: Quantized) -> MakeWeight:
    algorithm = algorithm_of(quantized.config)
    if algorithm not in _ALGORITHMS:
        raise not_read(quantized, f"its quant_algo {algorithm!r} is not one of {', '.join(_ALGORITHMS)}")
    return partial(_weight, quantized)


def algorithm_of(config: Mapping[str, Any]) -> object:
    """The `quant_algo` of a quantization_config, or of the content of hf_quant_config.json."""
    inner = config.get("quantization")
    return (inner if isinstance(inner, dict) else config).get("quant_algo")


def _weight(quantized: Quantized, name: str, parts: Parts) -> DerivedTensor:
    codes = parts["weight"]
    scale = require_part(name, parts, "scale", "weight", "weight_scale")
    if codes.stored_dtype != "U8":
        return fp8_weight(quantized, name, parts)
    whole = require_part(name, parts, "whole", "weight", "weight_scale_2")
    if len(codes.shape) != 2 or codes.shape[1] % (_GROUP // 2):
        problem = f"has shape {list(codes.shape)}, which is not that of groups of {_GROUP} codes in a matrix"
        raise InputError(codes.file, f"{problem}. {REPAIR}", tensor=name)
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    require_form(scale, ((rows, columns // _GROUP),), ("F8_E4M3",))
    require_form(whole, ((), (1,)), ("F32",))
    kept = {"weight": codes, "scale": float8(scale), "whole": whole}
    return DerivedTensor(name, quantized.dtype, (rows, columns), kept, partial(_decoded, quantized.dtype))


def _decoded(dtype: torch.dtype, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight [O, I]."""
    codes, scale, whole = parts["weight"], parts["scale"], parts["whole"].reshape(1)
    require_scales(scale.float(), zero=True)
    require_scales(whole, what="weight_scale_2")
    scheme = QuantizationScheme(targets=["Linear"], **NVFP4)

    def rows_of(slab: slice) -> Tensor:
        held = {"weight_packed": codes[slab], "weight_scale": scale[slab], "weight_global_scale": 1 / whole}
        made: Tensor = NVFP4PackedCompressor.decompress(held, scheme)["weight"]
        return made

    return by_rows((codes.shape[0], 2 * codes.shape[1]), dtype, 1, rows_of)


MODELOPT = Decoder(
    codes="weight",
    ends={"_scale": ("", "scale"), "_scale_2": ("", "whole")},
    open=_open,
    in_place=("F8_E4M3", "U8"),
)
"""Weights of `modelopt`."""
