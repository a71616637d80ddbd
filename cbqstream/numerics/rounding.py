"""Learned rounding: whether a weight goes to the grid point below or above it.

Shapes as in `affine.py`; R is the rank. Both modes start at round-to-nearest.

`lora` (AdaRound, Nagel et al. 2020, eq. 23; low-rank logits as in CBQ, arXiv 2312.07950, sec. 3.3):

    w_hat = s * clamp(floor(w / s0) + h(V), qmin - z, qmax - z)
    h(V) = clip(sigmoid(V) * (zeta - gamma) + gamma, 0, 1),    V = V0 + A1 A2,    V0 = h^-1(frac(w / s0))

With A2 = 0 the soft weight is the weight itself wherever the grid reaches. Codes belong to the starting scale s0; training moves the
scale they are multiplied by (as in TesseraQ, arXiv 2410.19103), so the gradient of both is exact.

`full` (SignRound, Cheng et al. 2023, eq. 3):

    w_hat = s * clamp(round(w / s + v), qmin - z, qmax - z),    v in [-1/2, 1/2]

with the straight-through estimator d round(x) / dx = 1, and v moved by the sign of its gradient as soon as the backward pass knows it.
"""

from typing import Any

import torch
from torch import Tensor

from cbqstream.numerics.affine import clamp_levels, grouped, row_tiles, rows_of

ZETA, GAMMA = 1.1, -0.1


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V), in [0, 1]. Any shape."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """V with h(V) = h, for h in [0, 1]. Any shape."""
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))


def low_rank_rise(w_OI: Tensor, scale0_OG: Tensor, a1_OR: Tensor, a2_RI: Tensor) -> tuple[Tensor, Tensor]:
    """floor(w / s0) and h(V0 + A1 A2), both float32 [O, G, K]; differentiable in A1 and A2."""
    w_OGK = grouped(w_OI.float(), scale0_OG.shape[1]) / scale0_OG.unsqueeze(-1)
    floor_OGK = w_OGK.floor()
    v0_OGK = inverse_rectified_sigmoid(w_OGK - floor_OGK)
    return floor_OGK, rectified_sigmoid(v0_OGK + grouped(a1_OR @ a2_RI, scale0_OG.shape[1]))


def rounding_penalty(rise: Tensor, beta: float) -> Tensor:
    """L_com = mean(1 - |2h - 1|^beta): 0 when every h is 0 or 1 (AdaRound eq. 24, per weight). A scalar."""
    return (1 - (2 * rise - 1).abs().pow(beta)).mean()


class StraightThroughRounding(torch.autograd.Function):
    """`full` mode's w_hat; its backward pass gives the gradient of theta = log(s / s0) and takes the sign-SGD step of v.

    d w_hat / d s = q - z - [in range] w / s (Esser et al. 2020, eq. 3), and d s / d theta = s.
    """

    @staticmethod
    def forward(
        ctx: Any,
        theta_OG: Tensor,
        w_OI: Tensor,
        scale0_OG: Tensor,
        v_OI: Tensor,
        low: Tensor | float,
        high: Tensor | float,
        step: float,
    ) -> Tensor:
        """w_hat, float32 [O, I]. `v_OI` is changed in place by the backward pass: v -= step * sign(dL/dv)."""
        scale_OG1 = (scale0_OG * theta_OG.exp()).unsqueeze(-1)
        groups = scale_OG1.shape[1]
        w_hat = torch.empty(w_OI.shape, dtype=torch.float32, device=w_OI.device)
        for rows in row_tiles(w_OI):
            levels = (grouped(w_OI[rows].float(), groups) / scale_OG1[rows]).add_(grouped(v_OI[rows], groups)).round_()
            clamp_levels(levels, rows_of(low, rows), rows_of(high, rows))
            torch.mul(levels, scale_OG1[rows], out=grouped(w_hat[rows], groups))
        ctx.save_for_backward(w_OI, scale_OG1)
        ctx.v, ctx.low, ctx.high, ctx.step = v_OI, low, high, step
        return w_hat

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of theta; v moves."""
        w_OI, scale_OG1 = ctx.saved_tensors
        groups = scale_OG1.shape[1]
        grad_theta = torch.empty(scale_OG1.shape[:2], dtype=torch.float32, device=w_OI.device)
        for rows in row_tiles(w_OI):
            grad_OGK, v_OGK = grouped(grads[0][rows], groups), grouped(ctx.v[rows], groups)
            low, high = rows_of(ctx.low, rows), rows_of(ctx.high, rows)
            w_over_s = grouped(w_OI[rows].float(), groups) / scale_OG1[rows]
            levels = (w_over_s + v_OGK).round_()
            inside = (levels >= low) & (levels <= high)
            slope = clamp_levels(levels, low, high).sub_(w_over_s.mul_(inside))
            torch.mul(slope.mul_(grad_OGK).sum(-1), scale_OG1[rows].squeeze(-1), out=grad_theta[rows])
            v_OGK.sub_(torch.sign(grad_OGK).mul_(inside), alpha=ctx.step).clamp_(-0.5, 0.5)
        return grad_theta, None, None, None, None, None, None
