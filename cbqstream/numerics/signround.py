"""Learned rounding with one value v per weight (SignRound, Cheng et al. 2023, eq. 3).

    w_hat = s * clamp(round(w / s + v), qmin - z, qmax - z),    s = s0 * exp(theta),    v in [-1/2, 1/2]

With the straight-through estimator d round(x) / dx = 1, the gradients are

    d w_hat / d theta = s * (q - z - [in range] w / s)        (LSQ, Esser et al. 2020, eq. 3; d s / d theta = s)
    d w_hat / d v     = s * [in range]

The backward pass updates v by the sign of its gradient as soon as the gradient is computed, so v needs no stored gradient and no optimizer
state.

Shapes are named as in `affine.py`. Both functions compute in float32 on a tile of rows. They use arithmetic instead of comparisons: on the
CPU, a comparison or a mixed dtype takes three to eight times as long.
"""

import torch
from torch import Tensor

from cbqstream.numerics.affine import Bound, clamp_levels, grouped


def rounded_levels(w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound) -> Tensor:
    """Levels clamp(round(w / s + v), low, high), float32 [O, G, K].

    Args:
        w_OI: weight, any float dtype.
        scale_OG: s, float32.
        v_OI: rounding values, any float dtype.
        low: smallest level, see `affine.level_range`.
        high: largest level.
    """
    groups = scale_OG.shape[1]
    levels = grouped(w_OI.float(), groups) / scale_OG.unsqueeze(-1)
    return clamp_levels(levels.add_(grouped(v_OI.float(), groups)).round_(), low, high)


def updated(
    w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound, gradient_OI: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """Gradient of theta, float32 [O, G], and v after a step against the sign of its gradient, float32 [O, I].

    Args:
        w_OI: weight, any float dtype.
        scale_OG: s, float32.
        v_OI: rounding values, any float dtype.
        low: smallest level, see `affine.level_range`.
        high: largest level.
        gradient_OI: gradient of the loss for w_hat.
        step: distance by which v moves.
    """
    groups, scale_OG1 = scale_OG.shape[1], scale_OG.unsqueeze(-1)
    gradient, v = grouped(gradient_OI.float(), groups), grouped(v_OI.float(), groups)
    w_over_s = grouped(w_OI.float(), groups) / scale_OG1
    levels = (w_over_s + v).round_()
    clamped = levels.clamp(low, high)  # type: ignore[arg-type]
    inside = levels.sub_(clamped).abs_().clamp_(max=1).neg_().add_(1)  # 1 or 0, because levels are integers
    slope = clamped.addcmul_(w_over_s, inside, value=-1).mul_(gradient)
    gradient_OG = slope.sum(-1) * scale_OG
    return gradient_OG, v.sub_(inside.mul_(torch.sign(gradient)), alpha=step).clamp_(-0.5, 0.5).flatten(1)
