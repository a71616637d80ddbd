"""Affine quantization of weights.

    q = clamp(round(w / s) + z, qmin, qmax)        w_hat = (q - z) * s

Shapes: O output features, I input features, G groups of a row, K = I / G columns of a group; `w_OI` can be viewed as `w_OGK`.
Codes are signed, with qmin = -2^(b-1) and qmax = 2^(b-1) - 1. The difference q - z is called the level. A symmetric weight has no zero
point.

Scales are float32 tensors that hold bf16 values of at least 2^-17. These values are exact in bf16, fp16 and fp32. A level times a scale
has at most 9 + 8 significant bits, so `w_hat` is exact in float32 on every device.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cbqstream.records import QuantizedWeight
from cbqstream.scheme import Scheme

SMALLEST_SCALE = 2.0**-17
_MAX_SQNR_DB = 200.0
_TILE, _DEVICE_TILE = 1 << 16, 1 << 23  # weights in a tile
_TILE_VALUES = 10  # float32 values that are in memory at once for each weight of a tile
LARGEST_SCALE = 65280.0  # largest bf16 value that fp16 can hold


Bound = Tensor | float
"""A bound of the levels q - z, as `level_range` returns it: a number, or float32 [O, G, 1]."""


def storable_scale(scale: Tensor) -> Tensor:
    """Nearest bf16 values of scales of any shape, clamped to [2^-17, 65280], as float32."""
    return scale.to(torch.bfloat16).float().clamp(SMALLEST_SCALE, LARGEST_SCALE)


def num_groups(in_features: int, group_size: int | None) -> int:
    """Number of groups in a row of `in_features` columns; 1 if the group size is None.

    Raises:
        ValueError: the group size does not divide the row.
    """
    if group_size is None:
        return 1
    if in_features % group_size:
        raise ValueError(f"group size {group_size} does not divide {in_features} columns")
    return in_features // group_size


def grouped(w_OI: Tensor, groups: int) -> Tensor:
    """View of a weight [O, I] as [O, G, K], without a copy."""
    return w_OI.view(w_OI.shape[0], groups, -1)


def row_tiles(w_OI: Tensor) -> Iterator[slice]:
    """Slices of rows of a weight, for computing on a tile of rows at a time.

    On the CPU, everything that is computed from a tile stays in the cache. On CUDA, it is small compared with the weight.
    """
    rows = max(1, (_TILE if w_OI.device.type == "cpu" else _DEVICE_TILE) // w_OI.shape[1])
    for start in range(0, w_OI.shape[0], rows):
        yield slice(start, min(start + rows, w_OI.shape[0]))


def device_tile_bytes(weights: int) -> int:
    """Memory on CUDA for computing on the tiles of a layer.

    Args:
        weights: number of weights of the layer.
    """
    return 4 * _TILE_VALUES * min(weights, _DEVICE_TILE)


def rows_of(value: Bound, rows: slice) -> Bound:
    """Bound of some rows; a number is the bound of every row."""
    return value[rows] if isinstance(value, Tensor) else value


def level_range(scheme: Scheme, zero_point_OG: Tensor | None) -> tuple[Bound, Bound]:
    """Smallest and largest level q - z: two numbers if symmetric, else two tensors, float32 [O, G, 1]."""
    if zero_point_OG is None:
        return float(scheme.qmin), float(scheme.qmax)
    z_OG1 = zero_point_OG.float().unsqueeze(-1)
    return scheme.qmin - z_OG1, scheme.qmax - z_OG1


def clamp_levels(levels_OGK: Tensor, low: Bound, high: Bound) -> Tensor:
    """Clamp levels in place to the bounds of `level_range`, and return them."""
    return levels_OGK.clamp_(low, high)  # type: ignore[arg-type]  # both are numbers or both are tensors


def nearest_levels(w_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor | None, scheme: Scheme) -> Tensor:
    """Levels q - z of a weight rounded to nearest, ties to even: float32 [O, G, K] holding integers."""
    w_OGK = grouped(w_OI.float(), scale_OG.shape[1])
    return clamp_levels((w_OGK / scale_OG.unsqueeze(-1)).round_(), *level_range(scheme, zero_point_OG))


def codes_of_levels(levels_OGK: Tensor, zero_point_OG: Tensor | None) -> Tensor:
    """Codes q, int8 [O, I], from levels q - z."""
    if zero_point_OG is not None:
        levels_OGK = levels_OGK + zero_point_OG.float().unsqueeze(-1)
    return levels_OGK.to(torch.int8).flatten(1)


def unsigned(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Unsigned codes and zero points, as most formats store them: `u = q + 2^(b-1)`.

    Returns:
        Codes [O, I] and zero points [O, G], both int32 and at least 0. The zero points of a symmetric weight are 2^(b-1).
    """
    middle = 1 << (weight.scheme.num_bits - 1)
    zero_point = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
    return weight.codes.to(torch.int32) + middle, zero_point.to(torch.int32) + middle


def sqnr_db(w_OI: Tensor, weight: QuantizedWeight) -> float:
    """Signal to quantization noise, `10 log10(sum w^2 / sum (w - w_hat)^2)`, in decibels.

    The result is finite and within -200 and 200: 200 for a weight that lost nothing, -200 for a weight of zeros that did not stay zero.
    """
    signal, noise = (torch.zeros((), dtype=torch.float64, device=w_OI.device) for _ in range(2))
    for rows in row_tiles(w_OI):
        tile = w_OI[rows].float()
        signal += tile.square().sum(dtype=torch.float64)
        noise += (tile - dequantize(weight.rows(rows))).square().sum(dtype=torch.float64)
    if not noise.item():
        return _MAX_SQNR_DB
    return 10 * math.log10(signal.item() / noise.item()) if signal.item() else -_MAX_SQNR_DB


def vanished_rows(w_OI: Tensor, weight: QuantizedWeight) -> int:
    """Number of rows that are zero throughout in a quantized weight and not in the original weight w, [O, I].

    A row vanishes if its weights are below half of the smallest scale that can be stored.
    """
    count = 0
    if (weight.scale == SMALLEST_SCALE).any():
        for rows in row_tiles(w_OI):
            gone = ~dequantize(weight.rows(rows)).any(1)
            count += int((gone & w_OI[rows].any(1)).sum())
    return count


def dequantize(weight: QuantizedWeight, out: Tensor | None = None) -> Tensor:
    """Dequantized weight `(q - z) * s`, [O, I].

    Args:
        weight: the quantized weight.
        out: where to write the result, rounded to the dtype of `out`. By default, the result is a new float32 tensor and exact.
    """
    w_hat = torch.empty(weight.codes.shape, device=weight.codes.device) if out is None else out
    groups = weight.scale.shape[1]
    for rows in row_tiles(weight.codes):
        levels_OGK = grouped(weight.codes[rows].float(), groups)
        if weight.zero_point is not None:
            levels_OGK.sub_(weight.zero_point[rows].float().unsqueeze(-1))
        torch.mul(levels_OGK, weight.scale[rows].unsqueeze(-1), out=grouped(w_hat[rows], groups))
    return w_hat
