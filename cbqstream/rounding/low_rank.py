"""Learned rounding by a low-rank matrix, `lora` mode: whether a weight goes to the grid point below or above it.

Shapes as in `affine.py`; R is the rank. AdaRound (Nagel et al. 2020, eq. 23), with low-rank logits as in CBQ (arXiv 2312.07950, sec. 3.3):

    w_hat = s * clamp(floor(w / s0) + h(V), qmin - z, qmax - z)
    h(V) = clip(sigmoid(V) * (zeta - gamma) + gamma, 0, 1),    V = V0 + A1 A2,    V0 = h^-1(frac(w / s0))

With A2 = 0 the soft weight is the weight itself wherever the grid reaches. Codes belong to the starting scale s0; training moves the
scale they are multiplied by (as in TesseraQ, arXiv 2410.19103), so the gradient of both is exact.

What drives the rounding to 0 or 1 is the penalty L_com = mean(1 - |2h - 1|^beta), 0 when every h is one of them (AdaRound eq. 24, per
weight). Its gradient is added where that of the weight is taken; both are written out, so that nothing of the size of a weight is kept:

    dL / dh = dL / dw_hat * s * [in range] - c * 2 beta / (O I) * |2h - 1|^(beta - 1) * sign(2h - 1)
    dL / dV = dL / dh * (zeta - gamma) * sigmoid(V) (1 - sigmoid(V)) * [h not clipped],    dL / dA1 = dL/dV A2^T,    dL / dA2 = A1^T dL/dV
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from cbqstream.numerics.affine import Bound, clamp_levels, grouped, row_tiles, rows_of
from cbqstream.runtime.scratch import Scratch

ZETA, GAMMA = 1.1, -0.1


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V), in [0, 1]. Any shape."""
    return _rectified(torch.sigmoid(v))


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """V with h(V) = h, for h in [0, 1]. Any shape."""
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))


def low_rank_rise(w_OI: Tensor, scale0_OG: Tensor, a1_OR: Tensor, a2_RI: Tensor) -> tuple[Tensor, Tensor]:
    """floor(w / s0) and h(V0 + A1 A2), both float32 [O, G, K]."""
    floor_OGK, sigmoid_OGK = _floor_and_sigmoid(w_OI, scale0_OG, a1_OR, a2_RI)
    return floor_OGK, _rectified(sigmoid_OGK)


def rounding_penalty(rise: Tensor, beta: float) -> Tensor:
    """L_com, a scalar."""
    return (1 - (2 * rise - 1).abs().pow(beta)).mean()


@dataclass(frozen=True, slots=True)
class LowRank:
    """A weight whose rounding is learned."""

    weight: Tensor
    """w [O, I], any float dtype."""
    scale0: Tensor
    """s0, float32 [O, G]."""
    low: Bound
    high: Bound
    beta: float
    penalty: float
    """c / (O I), what the penalty of one weight counts in the loss."""
    scratch: Scratch

    by_rows: ClassVar[tuple[bool, ...]] = (True, True, False)

    def part(self, rows: slice) -> Self:
        """See `LearnedWeight`."""
        of_rows = {name: rows_of(getattr(self, name), rows) for name in ("weight", "scale0", "low", "high")}
        return replace(self, **of_rows)  # type: ignore[arg-type]

    def soft(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """See `LearnedWeight`; the parameters are theta [O, G], A1 [O, R] and A2 [R, I]."""
        theta_OG, a1_OR, a2_RI = parameters
        scale_OG1 = (self.scale0 * theta_OG.exp()).unsqueeze(-1)
        w_hat = self.scratch.take("weight", self.weight.shape, dtype, self.weight.device)
        for rows in row_tiles(self.weight):
            floor, rise = low_rank_rise(self.weight[rows], self.scale0[rows], a1_OR[rows], a2_RI)
            levels = clamp_levels(floor.add_(rise), rows_of(self.low, rows), rows_of(self.high, rows))
            torch.mul(levels, scale_OG1[rows], out=grouped(w_hat[rows], scale_OG1.shape[1]))
        return w_hat

    def levels(self, parameters: Sequence[Tensor], scale_OG: Tensor) -> Tensor:
        """See `LearnedWeight`; they are of the starting scale, whatever is stored."""
        _, a1_OR, a2_RI = parameters
        floor, rise = low_rank_rise(self.weight, self.scale0, a1_OR, a2_RI)
        return clamp_levels(floor + (rise >= 0.5), self.low, self.high)

    def gradients(self, parameters: Sequence[Tensor], gradient_OI: Tensor) -> tuple[Tensor, ...]:
        """See `LearnedWeight`."""
        theta_OG, a1_OR, a2_RI = parameters
        scale_OG1 = (self.scale0 * theta_OG.exp()).unsqueeze(-1)
        of_theta, of_a1, of_a2 = torch.empty_like(theta_OG), torch.empty_like(a1_OR), torch.zeros_like(a2_RI)
        for rows in row_tiles(self.weight):
            gradient = grouped(gradient_OI[rows].float(), scale_OG1.shape[1]) * scale_OG1[rows]
            floor, sigmoid = _floor_and_sigmoid(self.weight[rows], self.scale0[rows], a1_OR[rows], a2_RI)
            rise = _rectified(sigmoid)
            reached = floor.add_(rise)
            levels = reached.clamp(rows_of(self.low, rows), rows_of(self.high, rows))  # type: ignore[arg-type]
            of_theta[rows] = (levels * gradient).sum(-1)
            slope = gradient.mul_(_equal(reached, levels))
            centered = 2 * rise - 1
            share = 2 * self.beta * self.penalty
            slope.addcmul_(centered.abs().pow_(self.beta - 1), centered.sign(), value=-share)
            slope.mul_(_equal(rise, sigmoid * (ZETA - GAMMA) + GAMMA))
            of_v = slope.mul_((ZETA - GAMMA) * sigmoid * (1 - sigmoid)).flatten(1)
            torch.mm(of_v, a2_RI.t(), out=of_a1[rows])
            of_a2.addmm_(a1_OR[rows].t(), of_v)
        return of_theta, of_a1, of_a2


def _floor_and_sigmoid(w_OI: Tensor, scale0_OG: Tensor, a1_OR: Tensor, a2_RI: Tensor) -> tuple[Tensor, Tensor]:
    """floor(w / s0) and sigmoid(V)."""
    w_OGK = grouped(w_OI.float(), scale0_OG.shape[1]) / scale0_OG.unsqueeze(-1)
    floor_OGK = w_OGK.floor()
    v0_OGK = inverse_rectified_sigmoid(w_OGK - floor_OGK)
    return floor_OGK, torch.sigmoid(v0_OGK + grouped(a1_OR @ a2_RI, scale0_OG.shape[1]))


def _rectified(sigmoid: Tensor) -> Tensor:
    return (sigmoid * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def _equal(one: Tensor, other: Tensor) -> Tensor:
    """1 where two values are the same, else 0: in arithmetic, which is faster than a comparison."""
    return (one - other).abs_().sign_().neg_().add_(1)
