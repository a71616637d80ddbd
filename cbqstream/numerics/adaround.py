"""AdaRound with low-rank logits: a learned choice between the grid points below and above each weight.

Shapes are named as in `affine.py`; R is the rank. The formulas are AdaRound (Nagel et al. 2020, eq. 23) with the low-rank logits of CBQ
(arXiv 2312.07950, sec. 3.3):

    w_hat = s * clamp(floor(w / s0) + h(V), qmin - z, qmax - z)
    h(V) = clip(sigmoid(V) * (zeta - gamma) + gamma, 0, 1),    V = V0 + A1 A2,    V0 = h^-1(frac(w / s0))

With A2 = 0, the soft weight equals the weight wherever it is within the range of the grid. Codes are computed with the starting scale s0.
Training changes only the scale s that they are multiplied by (as in TesseraQ, arXiv 2410.19103), so the gradients of the codes and of the
scale are exact.

The penalty L_com = mean(1 - |2h - 1|^beta) drives h to 0 or 1 (AdaRound eq. 24, per weight). With the loss L and a penalty whose weight
is c / (O I) for each element of w, the gradients are

    dL / dh = dL / dw_hat * s * [in range] - c * 2 beta / (O I) * |2h - 1|^(beta - 1) * sign(2h - 1)
    dL / dV = dL / dh * (zeta - gamma) * sigmoid(V) (1 - sigmoid(V)) * [h not clipped],    dL / dA1 = dL/dV A2^T,    dL / dA2 = A1^T dL/dV
"""

import torch
from torch import Tensor

from cbqstream.numerics.affine import grouped

ZETA, GAMMA = 1.1, -0.1
"""Upper and lower end of the range to which the sigmoid is stretched."""


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) from V of any shape, in [0, 1]."""
    return rectified(torch.sigmoid(v))


def rectified(sigmoid: Tensor) -> Tensor:
    """h(V) from sigmoid(V) of any shape: stretched to [gamma, zeta] and clipped to [0, 1]."""
    return (sigmoid * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """V with h(V) = h, for h in [0, 1] of any shape."""
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))


def floor_and_sigmoid(w_OI: Tensor, scale0_OG: Tensor, a1_OR: Tensor, a2_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Grid points below the weights, and sigmoids of the logits.

    Args:
        w_OI: weight, any float dtype.
        scale0_OG: starting scale s0, float32.
        a1_OR: factor A1 of the logits.
        a2_RI: factor A2 of the logits.

    Returns:
        floor(w / s0) and sigmoid(V0 + A1 A2), both float32 [O, G, K].
    """
    w_OGK = grouped(w_OI.float(), scale0_OG.shape[1]) / scale0_OG.unsqueeze(-1)
    floor_OGK = w_OGK.floor()
    v0_OGK = inverse_rectified_sigmoid(w_OGK - floor_OGK)
    return floor_OGK, torch.sigmoid(v0_OGK + grouped(a1_OR @ a2_RI, scale0_OG.shape[1]))


def rounding_penalty(h: Tensor, beta: float) -> Tensor:
    """L_com, a scalar that is 0 if every h is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).mean()


def logit_gradient(
    gradient_OGK: Tensor, reached_OGK: Tensor, levels_OGK: Tensor, sigmoid_OGK: Tensor, beta: float, penalty: float
) -> Tensor:
    """Gradient dL / dV of the logits, float32 [O, G, K].

    Args:
        gradient_OGK: dL / dw_hat * s; overwritten.
        reached_OGK: floor(w / s0) + h, before clamping.
        levels_OGK: `reached_OGK` after clamping to the grid.
        sigmoid_OGK: sigmoid(V).
        beta: exponent of the penalty.
        penalty: c / (O I), the weight of the penalty of one element of w in the loss.
    """
    h_OGK = rectified(sigmoid_OGK)
    slope = gradient_OGK.mul_(_equal(reached_OGK, levels_OGK))
    centered = 2 * h_OGK - 1
    slope.addcmul_(centered.abs().pow_(beta - 1), centered.sign(), value=-2 * beta * penalty)
    slope.mul_(_equal(h_OGK, sigmoid_OGK * (ZETA - GAMMA) + GAMMA))
    return slope.mul_((ZETA - GAMMA) * sigmoid_OGK * (1 - sigmoid_OGK))


def _equal(one: Tensor, other: Tensor) -> Tensor:
    """1 where two values are equal, else 0; by arithmetic, which is faster than a comparison on the CPU."""
    return (one - other).abs_().sign_().neg_().add_(1)
