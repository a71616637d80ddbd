"""Affine quantization of weights.

    q = clamp(round(w / s) + z, qmin, qmax)        w_hat = (q - z) * s

Shapes: O output features, I input features, G groups of a row, K = I / G columns of a group; `w_OI` may be seen as `w_OGK`.
Codes are signed, qmin = -2^(b-1), qmax = 2^(b-1) - 1. A symmetric weight has no zero point.

Scales are float32 tensors that hold bf16 values of at least 2^-17: the same numbers are exact in bf16, fp16 and fp32, and a code times
a scale has at most 9 + 8 significant bits, so `w_hat` is exact in float32 whatever computes it.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cbqstream.records import QuantizedWeight
from cbqstream.scheme import Scheme

SMALLEST_SCALE = 2.0**-17
_NOTHING_LOST = 200.0
_TILE, _DEVICE_TILE = 1 << 16, 1 << 23  # weights; up to ten float32 values of each are in memory at once
LARGEST_SCALE = 65280.0  # the largest bf16 value that fp16 holds


Bound = Tensor | float
"""Of levels q - z: a number, or float32 [O, G, 1]; see `level_range`."""


def storable_scale(scale: Tensor) -> Tensor:
    """Nearest bf16 value, clamped to [2^-17, 65280], as float32. Any shape."""
    return scale.to(torch.bfloat16).float().clamp(SMALLEST_SCALE, LARGEST_SCALE)


def num_groups(in_features: int, group_size: int | None) -> int:
    """Groups of a row of `in_features` columns.

    Raises:
        ValueError: the group size does not divide the row.
    """
    if group_size is None:
        return 1
    if in_features % group_size:
        raise ValueError(f"group size {group_size} does not divide {in_features} columns")
    return in_features // group_size


def grouped(w_OI: Tensor, groups: int) -> Tensor:
    """View of [O, I] as [O, G, K]. No copy."""
    return w_OI.view(w_OI.shape[0], groups, -1)


def row_tiles(w_OI: Tensor) -> Iterator[slice]:
    """Slices of rows, small enough that what is computed from a tile stays in the cache (CPU) or is small beside the weight (CUDA)."""
    rows = max(1, (_TILE if w_OI.device.type == "cpu" else _DEVICE_TILE) // w_OI.shape[1])
    for start in range(0, w_OI.shape[0], rows):
        yield slice(start, min(start + rows, w_OI.shape[0]))


def rows_of(value: Bound, rows: slice) -> Bound:
    """The rows of a tensor; a number is the same in every row."""
    return value[rows] if isinstance(value, Tensor) else value


def level_range(scheme: Scheme, zero_point_OG: Tensor | None) -> tuple[Bound, Bound]:
    """Smallest and largest level q - z: two numbers if symmetric, else two float32 [O, G, 1]."""
    if zero_point_OG is None:
        return float(scheme.qmin), float(scheme.qmax)
    z_OG1 = zero_point_OG.float().unsqueeze(-1)
    return scheme.qmin - z_OG1, scheme.qmax - z_OG1


def clamp_levels(levels_OGK: Tensor, low: Bound, high: Bound) -> Tensor:
    """Clamp in place to what `level_range` gives, and return the argument."""
    return levels_OGK.clamp_(low, high)  # type: ignore[arg-type]  # both are numbers or both are tensors


def nearest_levels(w_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor | None, scheme: Scheme) -> Tensor:
    """Levels q - z of round-to-nearest: float32 [O, G, K] holding integers. Ties go to even."""
    w_OGK = grouped(w_OI.float(), scale_OG.shape[1])
    return clamp_levels((w_OGK / scale_OG.unsqueeze(-1)).round_(), *level_range(scheme, zero_point_OG))


def codes_of_levels(levels_OGK: Tensor, zero_point_OG: Tensor | None) -> Tensor:
    """Codes q, int8 [O, I], of levels q - z."""
    if zero_point_OG is not None:
        levels_OGK = levels_OGK + zero_point_OG.float().unsqueeze(-1)
    return levels_OGK.to(torch.int8).flatten(1)


def unsigned(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Codes [O, I] and zero points [O, G] as most formats store them, int32 from 0: `u = q + 2^(b-1)`; without zero points, the middle."""
    middle = 1 << (weight.scheme.num_bits - 1)
    zero_point = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
    return weight.codes.to(torch.int32) + middle, zero_point.to(torch.int32) + middle


def sqnr_db(w_OI: Tensor, weight: QuantizedWeight) -> float:
    """`10 log10(sum w^2 / sum (w - w_hat)^2)`, decibels, within -200 and 200; a weight that lost nothing has 200."""
    signal, noise = (torch.zeros((), dtype=torch.float64, device=w_OI.device) for _ in range(2))
    for rows in row_tiles(w_OI):
        tile = w_OI[rows].float()
        signal += tile.square().sum(dtype=torch.float64)
        noise += (tile - dequantize(weight.rows(rows))).square().sum(dtype=torch.float64)
    if not noise.item():
        return _NOTHING_LOST
    return 10 * math.log10(signal.item() / noise.item()) if signal.item() else -_NOTHING_LOST


def dequantize(weight: QuantizedWeight, out: Tensor | None = None) -> Tensor:
    """`(q - z) * s`, [O, I]: float32 and exact, or in `out`, rounded to its dtype."""
    w_hat = torch.empty(weight.codes.shape, device=weight.codes.device) if out is None else out
    groups = weight.scale.shape[1]
    for rows in row_tiles(weight.codes):
        levels_OGK = grouped(weight.codes[rows].float(), groups)
        if weight.zero_point is not None:
            levels_OGK.sub_(weight.zero_point[rows].float().unsqueeze(-1))
        torch.mul(levels_OGK, weight.scale[rows].unsqueeze(-1), out=grouped(w_hat[rows], groups))
    return w_hat
