"""Starting values of scales and zero points.

`minmax` spreads all codes over the range of a group, extended to contain zero, which is the convention of compressed-tensors. `search`
scales this range by factors, most of them below 1, and selects for each group the range with the smallest error weighted by the second
moment of the inputs,

    sum_k E[x_k^2] (w_k - w_hat_k)^2.

This is the error of the output of the layer without the off-diagonal elements of E[x x^T] (the imatrix of llama.cpp and auto-round).
Shapes are named as in `affine.py`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cbqstream.numerics.affine import clamp_levels, grouped, level_range, num_groups, row_tiles, storable_scale
from cbqstream.scheme import Scheme

_SYMMETRIC_RATIOS = 80
_ASYMMETRIC_RATIOS = 16


def minmax_grid(w_OI: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point from the range of each group.

    Args:
        w_OI: weight, any float dtype.
        scheme: how the weight will be stored.

    Returns:
        Scale float32 [O, G], and zero point int8 [O, G] or None if symmetric.
    """
    w_OGK = grouped(w_OI.float(), num_groups(w_OI.shape[1], scheme.group_size))
    return _grid(w_OGK.amin(-1), w_OGK.amax(-1), scheme)


def search_grid(w_OI: Tensor, second_moment_I: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point with the smallest weighted error among scaled ranges of each group, the full range included.

    Args:
        w_OI: weight, any float dtype.
        second_moment_I: E[x^2] per input column, float32.
        scheme: how the weight will be stored.

    Returns:
        Scale float32 [O, G], and zero point int8 [O, G] or None if symmetric.
    """
    importance_GK = second_moment_I.float().view(num_groups(w_OI.shape[1], scheme.group_size), -1)
    tiles = [_search_rows(w_OI[rows], importance_GK, scheme) for rows in row_tiles(w_OI)]
    return torch.cat([scale for scale, _ in tiles]), None if scheme.symmetric else torch.cat(
        [zero for _, zero in tiles]
    )


def _search_rows(w_OI: Tensor, importance_GK: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale float32 and zero point int8, both [O, G], of a tile of rows; the zero point is 0 if symmetric."""
    w_OGK = grouped(w_OI.float(), importance_GK.shape[0])
    low_OG, high_OG = w_OGK.amin(-1), w_OGK.amax(-1)
    best_error = torch.full_like(low_OG, torch.inf)
    best_scale, best_zero = torch.empty_like(low_OG), torch.zeros_like(low_OG, dtype=torch.int8)
    for low_ratio, high_ratio in ratios(scheme):
        scale_OG, zero_OG = _grid(low_OG * low_ratio, high_OG * high_ratio, scheme)
        levels = clamp_levels((w_OGK / scale_OG.unsqueeze(-1)).round_(), *level_range(scheme, zero_OG))
        error_OG = levels.mul_(scale_OG.unsqueeze(-1)).sub_(w_OGK).square_().mul_(importance_GK).sum(-1)
        better = error_OG < best_error
        best_error = torch.where(better, error_OG, best_error)
        best_scale = torch.where(better, scale_OG, best_scale)
        if zero_OG is not None:
            best_zero = torch.where(better, zero_OG, best_zero)
    return best_scale, best_zero


def ratios(scheme: Scheme) -> Iterator[tuple[float, float]]:
    """Factors of the low and the high end of the range.

    The smallest factor depends on the number of bits: with fewer bits, smaller ranges reduce the error.
    """
    smallest = {2: 0.3, 3: 0.45, 4: 0.6}.get(scheme.num_bits, 0.75)
    yield 1.0, 1.0
    if scheme.symmetric:
        for ratio in torch.linspace(1.15, smallest, _SYMMETRIC_RATIOS).tolist():
            yield ratio, ratio
        return
    ratios = torch.linspace(1.0, smallest, _ASYMMETRIC_RATIOS).tolist()
    yield from ((low, high) for low in ratios for high in ratios)


def _grid(low_OG: Tensor, high_OG: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that spread the codes over the range [low, high], extended to contain zero."""
    low_OG, high_OG = low_OG.clamp(max=0), high_OG.clamp(min=0)
    steps = scheme.qmax - scheme.qmin
    if scheme.symmetric:
        return storable_scale(torch.maximum(-low_OG, high_OG) * 2 / steps), None
    scale_OG = storable_scale((high_OG - low_OG) / steps)
    zero_OG = (scheme.qmin - low_OG / scale_OG).round().clamp(scheme.qmin, scheme.qmax)
    return scale_OG, zero_OG.to(torch.int8)
