"""Triton kernel of the search of a grid: all candidates of a group are compared by one program, which reads the weight from the cache.

Formula: `numerics/scale_search.py`. Eager code moves about 5 kB a weight where a grid is symmetric, and 17 kB where it is not. The kernel
reads 2 bytes from memory. It divides by a scale as a multiplication by its inverse, and sums in another order than eager code, so of two
candidates with nearly the same error it may take the other one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cbqstream.numerics.affine import LARGEST_SCALE, SMALLEST_SCALE, num_groups
from cbqstream.numerics.scale_search import ratios
from cbqstream.rounding.tiles_triton import rounded, tiling
from cbqstream.scheme import Scheme

_ELEMENTS = 2048
"""Number of elements of a tile."""
_OPTIONS = {"num_warps": 4}
_SMALLEST, _LARGEST = tl.constexpr(SMALLEST_SCALE), tl.constexpr(LARGEST_SCALE)


@triton.jit
def _storable(scale):
    """See `affine.storable_scale`. Rounded with integers, because the interpreter truncates to bf16."""
    bits = scale.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.minimum(tl.maximum(bits.to(tl.float32, bitcast=True), _SMALLEST), _LARGEST)


@triton.jit
def _search_kernel(
    w_ptr, moment_ptr, ratios_ptr, scale_ptr, zero_ptr, rows, columns, groups, K, number, qmin, qmax,
    SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find the scale and the zero point of one group of ROWS rows, COLUMNS columns at a time. `number` pairs of ratios are compared."""
    group = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    start_of_rows = row.to(tl.int64) * columns + group * K
    low, high = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)  # a range contains zero
    for start in range(0, K, COLUMNS):
        offset = start + tl.arange(0, COLUMNS)
        mask = in_rows[:, None] & (offset < K)[None, :]
        w = tl.load(w_ptr + start_of_rows[:, None] + offset[None, :], mask=mask, other=0.0).to(tl.float32)
        low, high = tl.minimum(low, tl.min(w, axis=1)), tl.maximum(high, tl.max(w, axis=1))
    best_error = tl.full((ROWS,), float("inf"), tl.float32)
    best_scale, best_zero = tl.full((ROWS,), 1.0, tl.float32), tl.zeros((ROWS,), tl.float32)
    for each in range(number):
        low_of, high_of = low * tl.load(ratios_ptr + 2 * each), high * tl.load(ratios_ptr + 2 * each + 1)
        if SYMMETRIC:
            scale = _storable(tl.div_rn(tl.maximum(-low_of, high_of) * 2, qmax - qmin))
            zero = tl.zeros((ROWS,), tl.float32)
        else:
            scale = _storable(tl.div_rn(high_of - low_of, qmax - qmin))
            zero = tl.minimum(tl.maximum(rounded(qmin - tl.div_rn(low_of, scale)), qmin), qmax)
        inverse = tl.div_rn(1.0, scale)[:, None]
        smallest, largest = (qmin - zero)[:, None], (qmax - zero)[:, None]
        error = tl.zeros((ROWS,), tl.float32)
        for start in range(0, K, COLUMNS):
            offset = start + tl.arange(0, COLUMNS)
            in_columns = offset < K
            mask = in_rows[:, None] & in_columns[None, :]
            w = tl.load(w_ptr + start_of_rows[:, None] + offset[None, :], mask=mask, other=0.0).to(tl.float32)
            moment = tl.load(moment_ptr + group * K + offset, mask=in_columns, other=0.0)
            level = tl.minimum(tl.maximum(w * inverse, smallest), largest)  # the bounds are integers
            difference = rounded(level) * scale[:, None] - w
            error += tl.sum(difference * difference * moment[None, :], axis=1)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best_scale, best_zero = tl.where(better, scale, best_scale), tl.where(better, zero, best_zero)
    tl.store(scale_ptr + row * groups + group, best_scale, mask=in_rows)
    if not SYMMETRIC:
        tl.store(zero_ptr + row * groups + group, best_zero.to(tl.int8), mask=in_rows)


def search_grid(w_OI: Tensor, second_moment_I: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """See `scale_search.search_grid`."""
    rows, columns = w_OI.shape
    groups = num_groups(columns, scheme.group_size)
    constants, (_, down) = tiling(columns, rows, groups, _ELEMENTS)
    pairs = torch.tensor(list(ratios(scheme)), device=w_OI.device)
    scale_OG = torch.empty(rows, groups, device=w_OI.device)
    zero_OG = None if scheme.symmetric else torch.empty(rows, groups, dtype=torch.int8, device=w_OI.device)
    _search_kernel[groups, down](
        w_OI.contiguous(), second_moment_I.float().contiguous(), pairs, scale_OG, scale_OG if zero_OG is None else zero_OG, rows, columns,
        groups, columns // groups, len(pairs), float(scheme.qmin), float(scheme.qmax),
        SYMMETRIC=scheme.symmetric, **constants, **_OPTIONS,
    )  # fmt: skip
    return scale_OG, zero_OG
