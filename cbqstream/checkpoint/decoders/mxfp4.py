"""Fused experts in MXFP4, as gpt-oss stores them (`mxfp4`).

    W_blocks    U8 [E, O, I / 32, 16]    two FP4 codes (e2m1) in a byte, the first in the low bits
    W_scales    U8 [E, O, I / 32]        exponent of the scale 2^(byte - 127) of each group of 32

The weight W [E, I, O] is transposed, because transformers multiplies the inputs by it from the right. The arithmetic is that of
`convert_moe_packed_tensors` in `integrations/mxfp4.py` of transformers.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from cbqstream.checkpoint.decoders.decoder import (
    Decoder,
    MakeWeight,
    Parts,
    Quantized,
    by_rows,
    require_form,
    require_part,
)
from cbqstream.checkpoint.decoders.fp8 import of_fp4
from cbqstream.checkpoint.tensors import DerivedTensor

_BYTES = 16
_DIMENSIONS = 4
_BIAS, _NAN = 127, 255


def _open(quantized: Quantized) -> MakeWeight:
    return partial(_weight, quantized)


def _weight(quantized: Quantized, name: str, parts: Parts) -> DerivedTensor:
    blocks = parts["blocks"]
    scales = require_part(name, parts, "scales", "blocks", "_scales")
    if len(blocks.shape) != _DIMENSIONS or blocks.shape[-1] != _BYTES:
        require_form(blocks, ((*scales.shape, _BYTES),), ("U8",))
    require_form(blocks, (blocks.shape,), ("U8",))
    require_form(scales, (blocks.shape[:-1],), ("U8",))
    experts, rows, groups, _ = blocks.shape
    return DerivedTensor(
        name,
        quantized.dtype,
        (experts, 2 * _BYTES * groups, rows),
        {"blocks": blocks, "scales": scales},
        partial(_decoded, quantized.dtype),
        piecewise=True,
    )


def _decoded(dtype: torch.dtype, parts: Mapping[str, Tensor]) -> Tensor:
    """The weights [E, I, O] of all experts, or that of one expert [I, O]."""
    blocks, scales = parts["blocks"], parts["scales"]
    if (scales == _NAN).any():
        raise ValueError(f"a scale is the byte {_NAN}, which is not a number")
    if blocks.dim() < _DIMENSIONS:
        return _expert(blocks, scales, dtype)
    experts, rows, groups, _ = blocks.shape
    made = torch.empty(experts, 2 * _BYTES * groups, rows, dtype=dtype)
    for index in range(experts):
        made[index] = _expert(blocks[index], scales[index], dtype)
    return made


def _expert(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [I, O] of one expert."""
    rows, groups, _ = blocks.shape

    def rows_of(slab: slice) -> Tensor:
        values = of_fp4(blocks[slab], dtype)
        torch.ldexp(values, scales[slab].int()[..., None] - _BIAS, out=values)
        return values.flatten(1)

    return by_rows((rows, 2 * _BYTES * groups), dtype, 1, rows_of).T


MXFP4 = Decoder(codes="blocks", ends={"_blocks": ("", "blocks"), "_scales": ("", "scales")}, open=_open)
"""Fused experts of `mxfp4`."""
