"""Triton kernels of signround: each of the two operations of `SignRoundKernels` is one kernel.

A kernel reads each weight once and stores no intermediate result of the size of the weight. Per weight, the forward kernel moves 6 bytes
(w, v and w_hat in bf16) and the backward kernel 8 bytes (w, v, the gradient, and v again). Eager code moves about 280 bytes.

The results are identical bit for bit to those of `PlainKernels`, except for the gradient of theta: its sum over a group has another order.
That order is always the same, because there are no atomic operations. Divisions round to nearest, as in `PlainKernels`.

Programs that run one after the other work on the same rows, so that they read memory in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cbqstream.numerics.affine import Bound

_ROWS, _COLUMNS = 16, 128
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Options of every launch. Without fused multiplications and additions, results are those of `PlainKernels`."""
# 1.5 * 2^23: adding and subtracting it rounds to the nearest integer, ties to even
_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def _levels(w, v, scale, low, high):
    """w / s, the level to which it is rounded, and whether that level was within the grid before clamping (1 or 0)."""
    w_over_s = tl.div_rn(w, scale)
    # adding _MAGIC does not round values far outside the grid, so they are clamped to just outside it
    reached = tl.minimum(tl.maximum(w_over_s + v, low - 1.0), high + 1.0)
    level = (reached + _MAGIC) - _MAGIC
    inside = tl.where((level >= low) & (level <= high), 1.0, 0.0)
    return w_over_s, tl.minimum(tl.maximum(level, low), high), inside


@triton.jit
def _forward_kernel(
    w_ptr, v_ptr, scale_ptr, low_ptr, high_ptr, out_ptr, rows, columns, groups, K, low, high,
    BOUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of w_hat with ROWS x COLUMNS elements.

    K columns share a scale. With BOUNDS, each group has its own smallest and largest level.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = (row < rows) & (column < columns)
    at = row.to(tl.int64) * columns + column
    group = row * groups + column // K
    scale = tl.load(scale_ptr + group, mask=mask, other=1.0)
    if BOUNDS:
        low_of, high_of = (
            tl.load(low_ptr + group, mask=mask, other=0.0),
            tl.load(high_ptr + group, mask=mask, other=0.0),
        )
    else:
        low_of, high_of = low, high
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    _, level, _ = _levels(w, v, scale, low_of, high_of)
    tl.store(out_ptr + at, (level * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_update_kernel(
    w_ptr, v_ptr, scale_ptr, low_ptr, high_ptr, grad_ptr, theta_grad_ptr, rows, columns, groups, K, low, high, step,
    BOUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Update v of one group of ROWS rows, and compute the gradient of theta.

    The group is processed COLUMNS columns at a time, so the gradient of theta is always summed in the same order.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    group = row * groups + tl.program_id(0)
    in_rows = row < rows
    scale = tl.load(scale_ptr + group, mask=in_rows, other=1.0)
    if BOUNDS:
        low_of = tl.load(low_ptr + group, mask=in_rows, other=0.0)[:, None]
        high_of = tl.load(high_ptr + group, mask=in_rows, other=0.0)[:, None]
    else:
        low_of, high_of = low, high
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, K, COLUMNS):
        offset = start + tl.arange(0, COLUMNS)
        mask = in_rows[:, None] & (offset < K)[None, :]
        at = row[:, None].to(tl.int64) * columns + tl.program_id(0) * K + offset[None, :]
        w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        w_over_s, level, inside = _levels(w, v, scale[:, None], low_of, high_of)
        total += tl.sum((level - w_over_s * inside) * gradient, axis=1)
        sign = tl.where(gradient > 0, 1.0, 0.0) - tl.where(gradient < 0, 1.0, 0.0)
        moved = tl.minimum(tl.maximum(v - step * (sign * inside), -0.5), 0.5)
        tl.store(v_ptr + at, moved.to(tl.float16), mask=mask)
    tl.store(theta_grad_ptr + group, total * scale, mask=in_rows)


def forward(w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound, out_OI: Tensor) -> None:
    """Write w_hat into `out_OI`. See `SignRoundKernels.forward`."""
    rows, columns = w_OI.shape
    groups = scale_OG.shape[1]
    bounds = isinstance(low, Tensor)
    grid = (triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, _ROWS))
    _forward_kernel[grid](
        w_OI, v_OI, scale_OG, low if bounds else scale_OG, high if bounds else scale_OG, out_OI, rows, columns, groups,
        columns // groups, 0.0 if bounds else low, 0.0 if bounds else high,
        BOUNDS=bounds, ROWS=_ROWS, COLUMNS=_COLUMNS, **_OPTIONS,
    )  # fmt: skip


def backward_update(
    w_OI: Tensor,
    scale_OG: Tensor,
    v_OI: Tensor,
    low: Bound,
    high: Bound,
    gradient_OI: Tensor,
    step: float,
) -> Tensor:
    """Return the gradient of theta, and update v in place. See `SignRoundKernels.backward_update`."""
    rows, columns = w_OI.shape
    groups = scale_OG.shape[1]
    bounds = isinstance(low, Tensor)
    gradient_OG = torch.empty_like(scale_OG)
    size = columns // groups
    tile = min(_COLUMNS, triton.next_power_of_2(size))
    in_tile = _ROWS * _COLUMNS // tile  # tiles of one size, so that a thread reads 16 bytes at once in small groups too
    grid = (groups, triton.cdiv(rows, in_tile))
    _backward_update_kernel[grid](
        w_OI, v_OI, scale_OG, low if bounds else scale_OG, high if bounds else scale_OG, gradient_OI, gradient_OG, rows,
        columns, groups, size, 0.0 if bounds else low, 0.0 if bounds else high, step,
        BOUNDS=bounds, ROWS=in_tile, COLUMNS=tile, **_OPTIONS,
    )  # fmt: skip
    torch.autograd.graph.increment_version(v_OI)
    return gradient_OG
