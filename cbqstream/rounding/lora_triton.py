"""Triton kernels of lora_rounding: each of the two operations of `LoraKernels` is one kernel.

A kernel reads each weight once and multiplies the factors in registers; neither the logits nor their gradient is stored. Per weight, the
forward kernel moves 4 bytes (w and w_hat in bf16), and the backward kernel 4 bytes (w and the gradient) and partial sums: for groups of 128
and rank 5, 1.6 bytes written and read. Eager code moves about 600 bytes.

The formulas are those of `numerics/adaround.py`, with the sigmoid without a logarithm: for u = sigmoid(V0),

    sigmoid(V0 + A1 A2) = u / (u + (1 - u) exp(-A1 A2))

so h is a few float32 roundings away from that of `PlainKernels` (2e-6). The floor is the same bit for bit: divisions of weights round to
nearest. Gradients agree with the sums of `PlainKernels` within 1e-5 of the sum of the absolute values of their terms, but for weights whose
h is within rounding of 0 or 1, or whose level is within rounding of the end of the grid: there a gradient is either passed on or is zero.

There are no atomic operations. A program writes the sums over its tile, and a second pass adds them in a fixed order, so results are always
the same. Programs that run one after the other work on the same rows, so that they read memory in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cbqstream.numerics import adaround
from cbqstream.numerics.affine import Bound
from cbqstream.rounding.lora_kernels import PARTIAL_SUMS, LowRankWeight

_COLUMNS, _TILE = 128, 4096
"""Largest number of columns of a tile, and number of its elements."""
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""Options of every launch. Without fused multiplications and additions, results differ less from those of `PlainKernels`."""
_RANGE, _GAMMA = tl.constexpr(adaround.ZETA - adaround.GAMMA), tl.constexpr(adaround.GAMMA)
_OVER_RANGE = tl.constexpr(1 / (adaround.ZETA - adaround.GAMMA))
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)
_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _between(x, low, high):
    """Clamp x to low and high. NaN stays NaN, as in torch."""
    return tl.minimum(tl.maximum(x, low, propagate_nan=_NAN), high, propagate_nan=_NAN)


@triton.jit
def _tile(rows, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows, group and columns of the tile of a program, and which of them are in the weight. A tile is within one group."""
    tiles = tl.cdiv(K, COLUMNS)
    group = tl.program_id(0) // tiles
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    offset = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    return row, row < rows, group, group * K + offset, offset < K


@triton.jit
def _bounds(low_ptr, high_ptr, low, high, group, in_rows, BOUNDS: tl.constexpr):
    """Smallest and largest level of a group of each row. With BOUNDS, each group has its own."""
    if BOUNDS:
        low_of = tl.load(low_ptr + group, mask=in_rows, other=0.0)[:, None]
        high_of = tl.load(high_ptr + group, mask=in_rows, other=0.0)[:, None]
    else:
        low_of, high_of = low, high
    return low_of, high_of


@triton.jit
def _floor_and_sigmoid(
    w, scale0, a1_ptr, a2_ptr, row, in_rows, column, in_columns, columns,
    R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid points below the weights, and sigmoids of the logits. See `adaround.floor_and_sigmoid`."""
    product = w * 0.0  # zeros in the layout of w
    for r in range(R):
        a1 = tl.load(a1_ptr + row * R + r, mask=in_rows, other=0.0)
        a2 = tl.load(a2_ptr + r * columns + column, mask=in_columns, other=0.0)
        product += a1[:, None] * a2[None, :]
    w_over_s = tl.div_rn(w, scale0[:, None])
    floor = tl.floor(w_over_s)
    start = ((w_over_s - floor) - _GAMMA) * _OVER_RANGE
    return floor, start / (start + (1.0 - start) * tl.exp2(product * _MINUS_LOG2_E))


@triton.jit
def _forward_kernel(
    w_ptr, scale0_ptr, scale_ptr, a1_ptr, a2_ptr, low_ptr, high_ptr, out_ptr, rows, columns, groups, K, low, high,
    R: tl.constexpr, BOUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of w_hat with ROWS x COLUMNS elements. K columns share a scale."""
    row, in_rows, group, column, in_columns = _tile(rows, K, ROWS, COLUMNS)
    of_rows = row * groups + group
    scale0 = tl.load(scale0_ptr + of_rows, mask=in_rows, other=1.0)
    scale = tl.load(scale_ptr + of_rows, mask=in_rows, other=1.0)
    low_of, high_of = _bounds(low_ptr, high_ptr, low, high, of_rows, in_rows, BOUNDS)
    mask = in_rows[:, None] & in_columns[None, :]
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
    floor, sigmoid = _floor_and_sigmoid(
        w, scale0, a1_ptr, a2_ptr, row, in_rows, column, in_columns, columns, R, ROWS, COLUMNS
    )
    level = _between(floor + _between(sigmoid * _RANGE + _GAMMA, 0.0, 1.0), low_of, high_of)
    tl.store(out_ptr + at, (level * scale[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    w_ptr, scale0_ptr, scale_ptr, a1_ptr, a2_ptr, low_ptr, high_ptr, grad_ptr, theta_grad_ptr, a1_grad_ptr, a2_grad_ptr,
    rows, columns, groups, K, low, high, exponent, penalty,
    R: tl.constexpr, BOUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the part of a tile in the gradients of theta [O, tiles of a row], A1 [tiles of a row, O, R] and A2 [tiles of a column, R, I].

    `exponent` is beta - 1, and `penalty` is 2 beta times the weight of the penalty.
    """
    row, in_rows, group, column, in_columns = _tile(rows, K, ROWS, COLUMNS)
    of_rows = row * groups + group
    scale0 = tl.load(scale0_ptr + of_rows, mask=in_rows, other=1.0)
    scale = tl.load(scale_ptr + of_rows, mask=in_rows, other=1.0)
    low_of, high_of = _bounds(low_ptr, high_ptr, low, high, of_rows, in_rows, BOUNDS)
    mask = in_rows[:, None] & in_columns[None, :]
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
    floor, sigmoid = _floor_and_sigmoid(
        w, scale0, a1_ptr, a2_ptr, row, in_rows, column, in_columns, columns, R, ROWS, COLUMNS
    )
    stretched = sigmoid * _RANGE + _GAMMA
    h = _between(stretched, 0.0, 1.0)
    reached = floor + h
    level = _between(reached, low_of, high_of)
    tl.store(
        theta_grad_ptr + row * tl.num_programs(0) + tl.program_id(0), tl.sum(level * gradient, axis=1), mask=in_rows
    )

    centered = 2.0 * h - 1.0
    power = tl.exp2(exponent * tl.log2(tl.maximum(tl.abs(centered), 1e-30)))  # not the logarithm of 0
    slope = tl.where(reached == level, gradient, 0.0) - penalty * tl.where(centered < 0, -power, power)
    slope = tl.where(h == stretched, slope, 0.0) * (_RANGE * sigmoid * (1.0 - sigmoid))
    # factors outside the weight are 0, so that elements there add nothing
    a1_part = a1_grad_ptr + (tl.program_id(0).to(tl.int64) * rows + row) * R
    a2_part = a2_grad_ptr + tl.program_id(1).to(tl.int64) * R * columns + column
    for r in range(R):
        a1 = tl.load(a1_ptr + row * R + r, mask=in_rows, other=0.0)
        a2 = tl.load(a2_ptr + r * columns + column, mask=in_columns, other=0.0)
        tl.store(a1_part + r, tl.sum(slope * a2[None, :], axis=1), mask=in_rows)
        tl.store(a2_part + r * columns, tl.sum(slope * a1[:, None], axis=0), mask=in_columns)


def _arguments(weight: LowRankWeight) -> tuple[list[Bound], list[Bound], dict[str, int], tuple[int, int]]:
    """Pointers, numbers and constants with which both kernels are launched, and the grid."""
    (rows, columns), groups = weight.w.shape, weight.scale.shape[1]
    size, bounds = columns // groups, isinstance(weight.low, Tensor)
    tile = min(_COLUMNS, triton.next_power_of_2(size))
    in_tile = _TILE // tile  # tiles of one size, so that a thread reads 16 bytes at once in small groups too
    pointers = [*weight[:5], *(weight[5:] if bounds else (weight.scale, weight.scale))]
    numbers = [rows, columns, groups, size, *((0.0, 0.0) if bounds else weight[5:])]
    constants = {"R": weight.a1.shape[1], "BOUNDS": bounds, "ROWS": in_tile, "COLUMNS": tile}
    return pointers, numbers, constants, (groups * triton.cdiv(size, tile), triton.cdiv(rows, in_tile))


def forward(weight: LowRankWeight, out_OI: Tensor) -> None:
    """Write w_hat into `out_OI`. See `LoraKernels.forward`."""
    pointers, numbers, constants, grid = _arguments(weight)
    _forward_kernel[grid](*pointers, out_OI, *numbers, **constants, **_OPTIONS)


def backward(weight: LowRankWeight, gradient_OI: Tensor, beta: float, penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of theta, A1 and A2. See `LoraKernels.backward`.

    A weight with many partial sums is processed in parts, as many rows at a time as have no more than `PARTIAL_SUMS` of them.
    """
    *_, constants, (across, _) = _arguments(weight)
    (rows, columns), rank, in_tile = weight.w.shape, constants["R"], constants["ROWS"]
    tiles = max(1, PARTIAL_SUMS // (rank * columns + across * in_tile * (rank + 1)))
    parts = [slice(start, start + tiles * in_tile) for start in range(0, rows, tiles * in_tile)]
    found = [_gradients(weight.rows(part), gradient_OI[part], beta, penalty) for part in parts]
    if len(found) == 1:
        return found[0]
    theta, a1, a2 = zip(*found, strict=True)
    return torch.cat(theta), torch.cat(a1), torch.stack(a2).sum(0)


def _gradients(
    weight: LowRankWeight, gradient_OI: Tensor, beta: float, penalty: float
) -> tuple[Tensor, Tensor, Tensor]:
    pointers, numbers, constants, grid = _arguments(weight)
    (across, down), (rows, rank), columns = grid, weight.a1.shape, weight.w.shape[1]
    theta, a1, a2 = (
        torch.empty(shape, device=weight.w.device)
        for shape in ((rows, across), (across, rows, rank), (down, rank, columns))
    )
    _backward_kernel[grid](
        *pointers, gradient_OI, theta, a1, a2, *numbers, beta - 1, 2 * beta * penalty, **constants, **_OPTIONS
    )
    groups = weight.scale.shape[1]
    return theta if across == groups else theta.view(rows, groups, -1).sum(-1), a1.sum(0), a2.sum(0)
