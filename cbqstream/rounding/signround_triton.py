"""Triton kernels of signround: each of the two operations of `SignRoundKernels` is one kernel.

A kernel reads each weight once and stores no intermediate result of the size of the weight. Per weight, the forward kernel moves 6 bytes
(w, v and w_hat in bf16) and the backward kernel 8 bytes (w, v, the gradient, and v again). Eager code moves about 280 bytes.

The results are identical bit for bit to those of `PlainKernels`, except for the gradient of theta: its sum over a group has another order.
That order is always the same, because there are no atomic operations. Divisions round to nearest, as in `PlainKernels`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cbqstream.numerics.affine import Bound
from cbqstream.rounding.tiles_triton import bounds, launch_arguments, rounded, tile

_ELEMENTS = 1024
"""Number of elements of a tile."""
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Options of every launch. Without fused multiplications and additions, results are those of `PlainKernels`."""


@triton.jit
def _levels(w, v, scale, low, high):
    """w / s, the level to which it is rounded, and whether that level was within the grid before clamping."""
    w_over_s = tl.div_rn(w, scale)
    # `rounded` does not round values far outside the grid, so they are clamped to just outside it
    reached = tl.minimum(tl.maximum(w_over_s + v, low - 1.0), high + 1.0)
    level = rounded(reached)
    clamped = tl.minimum(tl.maximum(level, low), high)
    return w_over_s, clamped, level == clamped


@triton.jit
def _forward_kernel(
    w_ptr, scale_ptr, v_ptr, low_ptr, high_ptr, out_ptr, rows, columns, groups, K, low, high,
    BOUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of w_hat with ROWS x COLUMNS elements. K columns share a scale."""
    _, in_rows, of_rows, _, _, at, mask = tile(rows, columns, groups, K, ROWS, COLUMNS)
    scale = tl.load(scale_ptr + of_rows, mask=in_rows, other=1.0)[:, None]
    low_of, high_of = bounds(low_ptr, high_ptr, low, high, of_rows, in_rows, BOUNDS)
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    _, level, _ = _levels(w, v, scale, low_of, high_of)
    tl.store(out_ptr + at, (level * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_update_kernel(
    w_ptr, scale_ptr, v_ptr, low_ptr, high_ptr, grad_ptr, theta_grad_ptr, rows, columns, groups, K, low, high, step,
    BOUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Update a tile of v, and compute its part in the gradient of theta [O, tiles of a row]."""
    row, in_rows, of_rows, _, _, at, mask = tile(rows, columns, groups, K, ROWS, COLUMNS)
    scale = tl.load(scale_ptr + of_rows, mask=in_rows, other=1.0)
    low_of, high_of = bounds(low_ptr, high_ptr, low, high, of_rows, in_rows, BOUNDS)
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    w_over_s, level, inside = _levels(w, v, scale[:, None], low_of, high_of)
    total = tl.sum((level - tl.where(inside, w_over_s, 0.0)) * gradient, axis=1)
    tl.store(theta_grad_ptr + row * tl.num_programs(0) + tl.program_id(0), total * scale, mask=in_rows)
    sign = tl.where(gradient > 0, 1.0, 0.0) - tl.where(gradient < 0, 1.0, 0.0)
    moved = tl.minimum(tl.maximum(v - tl.where(inside, step * sign, 0.0), -0.5), 0.5)
    tl.store(v_ptr + at, moved.to(tl.float16), mask=mask)


def forward(w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound, out_OI: Tensor) -> None:
    """Write w_hat into `out_OI`. See `SignRoundKernels.forward`."""
    pointers, numbers, constants, grid = launch_arguments(w_OI.shape, scale_OG, low, high, _ELEMENTS)
    _forward_kernel[grid](w_OI, scale_OG, v_OI, *pointers, out_OI, *numbers, **constants, **_OPTIONS)


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
    pointers, numbers, constants, grid = launch_arguments(w_OI.shape, scale_OG, low, high, _ELEMENTS)
    (rows, groups), across = scale_OG.shape, grid[0]
    found = torch.empty(rows, across, device=w_OI.device)
    _backward_update_kernel[grid](
        w_OI, scale_OG, v_OI, *pointers, gradient_OI, found, *numbers, step, **constants, **_OPTIONS
    )
    torch.autograd.graph.increment_version(v_OI)
    return found if across == groups else found.view(rows, groups, -1).sum(-1)
