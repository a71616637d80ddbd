"""Weights in FP8 or FP4 with a scale for every block, row or tensor, as transformers (`fp8`, `fbgemm_fp8`) and ModelOpt store them.

    W              F8_E4M3 or F8_E5M2 [..., O, I]; I8 or F4 for two FP4 codes (e2m1) in a byte, the first in the low bits
    W_scale_inv    or W_scale: [..., ceil(O / a), ceil(I / b)] for blocks of a rows and b columns, [O] or [O, 1] for rows, [] or [1]
                   for the tensor; F32, F16, BF16, F8_E8M0, or U8 with the exponent of F8_E8M0

W is the name of the weight. DeepSeek V4 names the scale of `NAME.weight` `NAME.scale`, Mistral Large 4 `NAME.qscale_weight`. The weight is
`code * scale`, computed in float32, as in `Fp8Dequantize` of transformers and `FP8BlockDequantizer` of compressed-tensors.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

import torch
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
    require_scales,
)
from cbqstream.checkpoint.tensors import DerivedTensor, TensorInfo
from cbqstream.errors import InputError

_FP8 = ("F8_E4M3", "F8_E5M2")
_FP4 = ("I8", "F4")
_SCALES = ("F32", "F16", "BF16", "F8_E8M0", "U8")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the codes of FP4."""
_USUAL_BLOCK = (128, 128)
_MX_BLOCK = (1, 32)
"""Block of codes with scales that are powers of two (MXFP4, MXFP8)."""
_SHAPES_SHOWN = 3
_EXPERTS = 3
"""Number of dimensions of a weight that holds those of all experts."""


def _open(quantized: Quantized) -> MakeWeight:
    size = quantized.config.get("weight_block_size", _USUAL_BLOCK)
    if size is not None and not _is_block(size):
        raise not_read(quantized, f"its weight_block_size {size!r} is not two sizes")
    by_column = quantized.config.get("quant_method") == "fbgemm_fp8"
    return partial(
        fp8_weight, quantized, block=_USUAL_BLOCK if size is None else (size[0], size[1]), by_column=by_column
    )


def _is_block(value: Any) -> TypeGuard[tuple[int, int]]:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(one) is int and one > 0 for one in value)


def fp8_weight(
    quantized: Quantized,
    name: str,
    parts: Parts,
    *,
    block: tuple[int, int] = _USUAL_BLOCK,
    by_column: bool = False,
) -> DerivedTensor:
    """The weight with a name, from its parts `weight` and `scale`.

    Args:
        quantized: description of the model.
        name: name of the weight.
        parts: parts of the weight.
        block: rows and columns of a block, if the scales are those of blocks.
        by_column: whether the experts [E, I, O] of a fused weight have a scale for each of the O outputs, in any shape.

    Raises:
        InputError: the parts do not fit together.
    """
    codes, scale = parts["weight"], parts["scale"]
    if codes.stored_dtype in _FP8:
        codes = float8(codes)
    else:
        in_bytes = (*codes.shape[:-1], codes.shape[-1] // 2) if codes.stored_dtype == "F4" else codes.shape
        codes = replace(codes, torch_dtype=torch.uint8, shape=in_bytes)
    shape = codes.shape if codes.stored_dtype in _FP8 else (*codes.shape[:-1], 2 * codes.shape[-1])
    if len(shape) < 2:
        raise InputError(codes.file, f"has shape {list(shape)}, which is not a matrix. {REPAIR}", tensor=name)
    found = _block_of(scale, shape, block, by_column=by_column and len(shape) == _EXPERTS)
    return DerivedTensor(
        name,
        quantized.dtype,
        shape,
        {"weight": codes, "scale": float8(scale)},
        partial(_decoded, found, quantized.dtype),
        piecewise=len(shape) == _EXPERTS and scale.shape[:1] == shape[:1] and scale.shape != (1,),
    )


def _block_of(scale: TensorInfo, shape: tuple[int, ...], block: tuple[int, int], *, by_column: bool) -> tuple[int, int]:
    """Rows and columns of the part of a weight [..., O, I] to which one scale belongs.

    Raises:
        InputError: the scales have a shape or dtype that no block explains.
    """
    *lead, rows, columns = shape
    of_columns = (rows, 1)
    sizes = [of_columns] if by_column else [block, _MX_BLOCK, (1, columns), (rows, columns), of_columns]
    shapes: dict[tuple[int, ...], tuple[int, int]] = {}
    for high, wide in sizes:
        down, across = -(-rows // high), -(-columns // wide)
        shapes.setdefault((*lead, down, across), (high, wide))
        if not lead:  # ModelOpt
            shapes.setdefault((down, 1, across, 1), (high, wide))
    if by_column:
        shapes.setdefault((*lead, columns, 1), of_columns)
    else:
        shapes.setdefault((*lead, rows), (1, columns))
        for one in ((*lead,), (1,), ()):
            shapes.setdefault(one, (rows, columns))
    if scale.shape not in shapes or scale.stored_dtype not in _SCALES:
        require_form(scale, list(shapes)[:_SHAPES_SHOWN], _SCALES)
    return shapes[scale.shape]


def _decoded(block: tuple[int, int], dtype: torch.dtype, parts: dict[str, Tensor]) -> Tensor:
    """The weight [..., O, I], or one of its experts.

    Args:
        block: rows and columns to which one scale belongs.
        dtype: dtype of the weight.
        parts: the codes, and the scales in any shape in which they follow the blocks.
    """
    codes, scale = parts["weight"], parts["scale"]
    scale = exponents(scale) if scale.dtype == torch.uint8 else scale.float()
    require_scales(scale, zero=True)
    fp4 = codes.dtype == torch.uint8
    *lead, rows, columns = codes.shape
    columns *= 2 if fp4 else 1
    down, across = -(-rows // block[0]), -(-columns // block[1])
    count = math.prod(lead)
    codes = codes.reshape(count, rows, -1)
    scale = scale.reshape(1, 1, 1).expand(count, 1, 1) if scale.numel() == 1 else scale.reshape(count, down, across)

    def expert(index: int) -> Tensor:
        def rows_of(slab: slice) -> Tensor:
            values = of_fp4(codes[index, slab]) if fp4 else _of_fp8(codes[index, slab])
            of_rows = scale[index]
            if down > 1:
                of_rows = of_rows[slab.start // block[0] : -(-slab.stop // block[0])]
                of_rows = of_rows.repeat_interleave(block[0], 0)[: len(values)]
            if across == 1:
                return values.mul_(of_rows)
            if columns % block[1] == 0:
                return values.reshape(len(values), across, -1).mul_(of_rows[..., None]).flatten(1)
            return values.mul_(of_rows.repeat_interleave(block[1], 1)[:, :columns])

        return by_rows((rows, columns), dtype, block[0] if down > 1 else 1, rows_of)

    if not lead:
        return expert(0)
    made = torch.empty(count, rows, columns, dtype=dtype)
    for index in range(count):
        made[index] = expert(index)
    return made.reshape(*lead, rows, columns)


def exponents(codes: Tensor) -> Tensor:
    """Powers of two from the bytes of F8_E8M0; NaN for 255."""
    return codes.view(torch.float8_e8m0fnu).float()


def of_fp4(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values, [..., 2 N] in a floating dtype, of the FP4 codes in bytes [..., N]."""
    values = torch.tensor(_E2M1, dtype=dtype)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)  # of all bytes
    words = pairs.view(torch.int64 if dtype == torch.float32 else torch.int32).flatten()
    return words.index_select(0, codes.flatten().int()).view(dtype).reshape(*codes.shape[:-1], -1)


def _of_fp8(codes: Tensor) -> Tensor:
    """Values, float32, of codes in FP8. On the CPU, a table is several times faster than the conversion of torch."""
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return table.index_select(0, codes.view(torch.uint8).flatten().int()).reshape(codes.shape)


FP8 = Decoder(
    codes="weight",
    ends={
        "_scale_inv": ("", "scale"),
        "_scale": ("", "scale"),
        ".scale": (".weight", "scale"),
        ".qscale_weight": (".weight", "scale"),
    },
    open=_open,
    in_place=(*_FP8, *_FP4),
)
"""Weights of `fp8` and `fbgemm_fp8`."""
