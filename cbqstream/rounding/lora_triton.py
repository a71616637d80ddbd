"""Triton kernels of lora_rounding: each of the two operations of `LoraKernels` is one kernel.

A kernel reads each weight once and multiplies the factors in registers; neither the logits nor their gradient is stored. Per weight, the
forward kernel moves 4 bytes (w and w_hat in bf16), and the backward kernel 4 bytes (w and the gradient) and partial sums: for groups of 128
and rank 5, 2.9 bytes written and read. Eager code moves about 600 bytes.

The formulas are those of `numerics/adaround.py`, with the sigmoid without a logarithm: for u = sigmoid(V0),

    sigmoid(V0 + A1 A2) = u / (u + (1 - u) exp(-A1 A2))

so h is a few float32 roundings away from that of `PlainKernels` (2e-6). The floor is the same bit for bit: divisions of weights round to
nearest. The gradient of theta agrees with that of `PlainKernels` within 1e-5 of the sum of the absolute values of its terms, and those of
the factors within 2^-9 of it. Exceptions are weights whose h is within rounding of 0 or 1, or whose level is within rounding of the end of
the grid: there a gradient is either passed on or is zero.

The gradients of A1 and A2 are products of dV with the factors, on tensor cores: dV and the factors are truncated to tf32, which has 11
significant bits, and the sums are float32. dV is made from a gradient in bf16, which has 8. As sums of a tile over its rows, in float32,
they took two thirds of the time of the kernel.

There are no atomic operations. A program writes the sums over its tile, and a second pass adds them in a fixed order, so results are always
the same.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from cbqstream.numerics import adaround
from cbqstream.rounding.lora_kernels import PARTIAL_SUMS, LowRankWeight
from cbqstream.rounding.tiles_triton import bounds, launch_arguments, tile

_ELEMENTS = 2048
"""Number of elements of a tile."""
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Options of every launch. Without fused multiplications and additions, results differ less from those of `PlainKernels`."""
_RANK = 16
"""Smallest rank of a product in a kernel; factors of a smaller rank are extended with zeros."""
_RANGE, _GAMMA = tl.constexpr(adaround.ZETA - adaround.GAMMA), tl.constexpr(adaround.GAMMA)
_OVER_RANGE = tl.constexpr(1 / (adaround.ZETA - adaround.GAMMA))
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)
_NAN = tl.constexpr(tl.PropagateNan.ALL)
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # the interpreter has no libdevice


@triton.jit
def _log2(x):
    """Logarithm as the instruction of the device; that of Triton takes twenty."""
    return tl.log2(x) if _INTERPRETED else libdevice.fast_log2f(x)


@triton.jit
def _divide(x, y):
    """Quotient within two float32 roundings."""
    return x / y if _INTERPRETED else libdevice.fast_dividef(x, y)


@triton.jit
def _between(x, low, high):
    """Clamp x to low and high. NaN stays NaN, as in torch."""
    return tl.minimum(tl.maximum(x, low, propagate_nan=_NAN), high, propagate_nan=_NAN)


@triton.jit
def _floor_and_sigmoid(w, scale0, a1_ptr, a2_ptr, row, in_rows, column, in_columns, columns, R: tl.constexpr):
    """Grid points below the weights, and sigmoids of the logits. See `adaround.floor_and_sigmoid`."""
    product = w * 0.0  # zeros in the layout of w
    for r in range(R):
        a1 = tl.load(a1_ptr + row * R + r, mask=in_rows, other=0.0)
        a2 = tl.load(a2_ptr + r * columns + column, mask=in_columns, other=0.0)
        product = tl.fma(tl.broadcast_to(a1[:, None], w.shape), tl.broadcast_to(a2[None, :], w.shape), product)
    w_over_s = tl.div_rn(w, scale0[:, None])
    floor = tl.floor(w_over_s)
    start = ((w_over_s - floor) - _GAMMA) * _OVER_RANGE
    return floor, _divide(start, start + (1.0 - start) * tl.exp2(product * _MINUS_LOG2_E))


@triton.jit
def _forward_kernel(
    w_ptr, scale0_ptr, scale_ptr, a1_ptr, a2_ptr, low_ptr, high_ptr, out_ptr, rows, columns, groups, K, low, high,
    R: tl.constexpr, BOUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of w_hat with ROWS x COLUMNS elements. K columns share a scale."""
    row, in_rows, of_rows, column, in_columns, at, mask = tile(rows, columns, groups, K, ROWS, COLUMNS)
    scale0 = tl.load(scale0_ptr + of_rows, mask=in_rows, other=1.0)
    scale = tl.load(scale_ptr + of_rows, mask=in_rows, other=1.0)
    low_of, high_of = bounds(low_ptr, high_ptr, low, high, of_rows, in_rows, BOUNDS)
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
    floor, sigmoid = _floor_and_sigmoid(w, scale0, a1_ptr, a2_ptr, row, in_rows, column, in_columns, columns, R)
    level = _between(floor + _between(sigmoid * _RANGE + _GAMMA, 0.0, 1.0), low_of, high_of)
    tl.store(out_ptr + at, (level * scale[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    w_ptr, scale0_ptr, scale_ptr, a1_ptr, a2_ptr, low_ptr, high_ptr, grad_ptr, theta_grad_ptr, a1_grad_ptr, a2_grad_ptr,
    rows, columns, groups, K, low, high, exponent, penalty,
    R: tl.constexpr, P: tl.constexpr, BOUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the part of a tile in the gradients of theta [O, tiles of a row], A1 [tiles of a row, O, R] and A2 [tiles of a column, R, I].

    `exponent` is beta - 1, and `penalty` is 2 beta times the weight of the penalty. P is a power of two and at least R.
    """
    row, in_rows, of_rows, column, in_columns, at, mask = tile(rows, columns, groups, K, ROWS, COLUMNS)
    scale0 = tl.load(scale0_ptr + of_rows, mask=in_rows, other=1.0)
    scale = tl.load(scale_ptr + of_rows, mask=in_rows, other=1.0)
    low_of, high_of = bounds(low_ptr, high_ptr, low, high, of_rows, in_rows, BOUNDS)
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
    floor, sigmoid = _floor_and_sigmoid(w, scale0, a1_ptr, a2_ptr, row, in_rows, column, in_columns, columns, R)
    stretched = sigmoid * _RANGE + _GAMMA
    h = _between(stretched, 0.0, 1.0)
    reached = floor + h
    level = _between(reached, low_of, high_of)
    tl.store(
        theta_grad_ptr + row * tl.num_programs(0) + tl.program_id(0), tl.sum(level * gradient, axis=1), mask=in_rows
    )

    centered = 2.0 * h - 1.0
    power = tl.exp2(exponent * _log2(tl.maximum(tl.abs(centered), 1e-30)))  # not the logarithm of 0
    slope = tl.where(reached == level, gradient, 0.0) - penalty * tl.where(centered < 0, -power, power)
    slope = tl.where(h == stretched, slope, 0.0) * (_RANGE * sigmoid * (1.0 - sigmoid))
    # factors outside the weight are 0, so that elements there add nothing
    each = tl.arange(0, P)
    a1_at, of_a1 = row[:, None] * R + each[None, :], in_rows[:, None] & (each < R)[None, :]
    a2_at, of_a2 = each[:, None] * columns + column[None, :], (each < R)[:, None] & in_columns[None, :]
    a1 = tl.load(a1_ptr + a1_at, mask=of_a1, other=0.0)
    a2 = tl.load(a2_ptr + a2_at, mask=of_a2, other=0.0)
    a1_part = a1_grad_ptr + tl.program_id(0).to(tl.int64) * rows * R
    a2_part = a2_grad_ptr + tl.program_id(1).to(tl.int64) * R * columns
    tl.store(a1_part + a1_at, tl.dot(slope, tl.trans(a2), input_precision="tf32"), mask=of_a1)
    tl.store(a2_part + a2_at, tl.dot(tl.trans(a1), slope, input_precision="tf32"), mask=of_a2)


def _arguments(weight: LowRankWeight) -> tuple[list[Tensor], list[float], dict[str, int], tuple[int, int]]:
    """Pointers, numbers and constants with which both kernels are launched, and the grid."""
    described = weight.w.shape, weight.scale, weight.low, weight.high
    pointers, numbers, constants, grid = launch_arguments(*described, _ELEMENTS)
    return [*weight[:5], *pointers], numbers, {"R": weight.a1.shape[1], **constants}, grid


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
    extended = max(_RANK, triton.next_power_of_2(rank))
    theta, a1, a2 = (
        torch.empty(shape, device=weight.w.device)
        for shape in ((rows, across), (across, rows, rank), (down, rank, columns))
    )
    _backward_kernel[grid](
        *pointers,
        gradient_OI,
        theta,
        a1,
        a2,
        *numbers,
        beta - 1,
        2 * beta * penalty,
        P=extended,
        **constants,
        **_OPTIONS,
    )
    groups = weight.scale.shape[1]
    return theta if across == groups else theta.view(rows, groups, -1).sum(-1), a1.sum(0), a2.sum(0)
