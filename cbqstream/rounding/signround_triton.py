"""The two passes of `straight_through.py` as one kernel each: a weight is read once and nothing of its size is kept.

The forward kernel moves 6 bytes a weight (w, v, w_hat in bf16), the backward one 8 (w, v, its gradient, v again); eager code: about 280.
Both give the bits of the plain path, except for the sum over a group in the gradient of theta, which runs in another order: always the
same one, without atomics. Divisions round to nearest, as the plain path's do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cbqstream.numerics.affine import Bound

_ROWS, _COLUMNS = 16, 128
_MAGIC = tl.constexpr(
    12582912.0
)  # 1.5 * 2^23: adding and taking it away rounds to the nearest whole number, ties to even


@triton.jit
def _levels(w, v, scale, low, high):
    """w / s, the level it is rounded to, and whether that level was within the grid (1 or 0)."""
    w_over_s = tl.div_rn(w, scale)
    reached = tl.minimum(
        tl.maximum(w_over_s + v, low - 1.0), high + 1.0
    )  # beyond is beyond, and far values would not round
    level = (reached + _MAGIC) - _MAGIC
    inside = tl.where((level >= low) & (level <= high), 1.0, 0.0)
    return w_over_s, tl.minimum(tl.maximum(level, low), high), inside


@triton.jit
def _forward_kernel(
    w_ptr, v_ptr, scale_ptr, low_ptr, high_ptr, out_ptr, rows, columns, groups, K, low, high,
    BOUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS x COLUMNS of w_hat; K columns share a scale; BOUNDS: low and high differ from group to group."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
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
    """One group of ROWS rows, COLUMNS at a time: v moves, and the gradient of theta is summed in the same order every time."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = row * groups + tl.program_id(1)
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
        at = row[:, None].to(tl.int64) * columns + tl.program_id(1) * K + offset[None, :]
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
    """w_hat into `out_OI`, see `Passes`."""
    rows, columns = w_OI.shape
    groups = scale_OG.shape[1]
    bounds = isinstance(low, Tensor)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    _forward_kernel[grid](
        w_OI, v_OI, scale_OG, low if bounds else scale_OG, high if bounds else scale_OG, out_OI, rows, columns, groups,
        columns // groups, 0.0 if bounds else low, 0.0 if bounds else high,
        BOUNDS=bounds, ROWS=_ROWS, COLUMNS=_COLUMNS,
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
    """The gradient of theta; v moves, see `Passes`."""
    rows, columns = w_OI.shape
    groups = scale_OG.shape[1]
    bounds = isinstance(low, Tensor)
    gradient_OG = torch.empty_like(scale_OG)
    size = columns // groups
    grid = (triton.cdiv(rows, _ROWS), groups)
    _backward_update_kernel[grid](
        w_OI, v_OI, scale_OG, low if bounds else scale_OG, high if bounds else scale_OG, gradient_OI, gradient_OG, rows,
        columns, groups, size, 0.0 if bounds else low, 0.0 if bounds else high, step,
        BOUNDS=bounds, ROWS=_ROWS, COLUMNS=min(_COLUMNS, triton.next_power_of_2(size)),
    )  # fmt: skip
    torch.autograd.graph.increment_version(v_OI)
    return gradient_OG
