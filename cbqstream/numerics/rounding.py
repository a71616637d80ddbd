"""Learned rounding by a low-rank matrix, `lora` mode: whether a weight goes to the grid point below or above it.

Shapes as in `affine.py`; R is the rank. AdaRound (Nagel et al. 2020, eq. 23), with low-rank logits as in CBQ (arXiv 2312.07950, sec. 3.3):

    w_hat = s * clamp(floor(w / s0) + h(V), qmin - z, qmax - z)
    h(V) = clip(sigmoid(V) * (zeta - gamma) + gamma, 0, 1),    V = V0 + A1 A2,    V0 = h^-1(frac(w / s0))

With A2 = 0 the soft weight is the weight itself wherever the grid reaches. Codes belong to the starting scale s0; training moves the
scale they are multiplied by (as in TesseraQ, arXiv 2410.19103), so the gradient of both is exact.
"""

import torch
from torch import Tensor

from cbqstream.numerics.affine import grouped

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
