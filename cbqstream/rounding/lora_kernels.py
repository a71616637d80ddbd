"""The two fused operations of lora_rounding on a weight: forward, and the gradients of everything that is learned.

`PlainKernels` uses torch alone, in tiles of rows that fit in the cache. On CUDA, `lora_triton.py` has each operation as one kernel.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cbqstream.numerics.adaround import floor_and_sigmoid, logit_gradient, rectified
from cbqstream.numerics.affine import Bound, clamp_levels, grouped, row_tiles, rows_of
from cbqstream.rounding.kernels import KernelSet

PARTIAL_SUMS = 1 << 25
"""Largest number of partial sums that the backward kernel has in memory at once, float32."""


class LowRankWeight(NamedTuple):
    """A weight, its grid and the factors of its rounding logits."""

    w: Tensor
    """The weight, any float dtype [O, I]."""
    scale0: Tensor
    """Starting scale s0, float32 [O, G]."""
    scale: Tensor
    """Learned scale s, float32 [O, G]."""
    a1: Tensor
    """Factor A1, float32 [O, R]."""
    a2: Tensor
    """Factor A2, float32 [R, I]."""
    low: Bound
    """Smallest level, see `affine.level_range`."""
    high: Bound
    """Largest level."""

    def rows(self, rows: slice) -> "LowRankWeight":
        """Some rows of the weight, with their scales, factors and bounds."""
        bounds = rows_of(self.low, rows), rows_of(self.high, rows)
        return LowRankWeight(self.w[rows], self.scale0[rows], self.scale[rows], self.a1[rows], self.a2, *bounds)


class LoraKernels(Protocol):
    """The fused operations. Formulas: `numerics/adaround.py`."""

    def forward(self, weight: LowRankWeight, out_OI: Tensor) -> None:
        """Write w_hat into `out_OI`, in its dtype."""
        ...

    def backward(
        self, weight: LowRankWeight, gradient_OI: Tensor, beta: float, penalty: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of theta [O, G], A1 [O, R] and A2 [R, I], float32.

        Args:
            weight: the weight.
            gradient_OI: gradient of w_hat, any float dtype.
            beta: exponent of the penalty, at least 2.
            penalty: weight of the penalty of one element of w in the loss.
        """
        ...


class PlainKernels:
    """The operations with torch alone, on any device."""

    def forward(self, weight: LowRankWeight, out_OI: Tensor) -> None:
        """See `LoraKernels`."""
        groups = weight.scale.shape[1]
        for tile in row_tiles(weight.w):
            w_OI, scale0_OG, scale_OG, a1_OR, a2_RI, low, high = weight.rows(tile)
            floor, sigmoid = floor_and_sigmoid(w_OI, scale0_OG, a1_OR, a2_RI)
            levels = clamp_levels(floor.add_(rectified(sigmoid)), low, high)
            torch.mul(levels, scale_OG.unsqueeze(-1), out=grouped(out_OI[tile], groups))

    def backward(
        self, weight: LowRankWeight, gradient_OI: Tensor, beta: float, penalty: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `LoraKernels`."""
        theta_gradient, a1_gradient, a2_gradient = (
            torch.empty_like(weight.scale),
            torch.empty_like(weight.a1),
            torch.zeros_like(weight.a2),
        )
        groups = weight.scale.shape[1]
        for tile in row_tiles(weight.w):
            w_OI, scale0_OG, scale_OG, a1_OR, a2_RI, low, high = weight.rows(tile)
            gradient = grouped(gradient_OI[tile].float(), groups) * scale_OG.unsqueeze(-1)
            floor, sigmoid = floor_and_sigmoid(w_OI, scale0_OG, a1_OR, a2_RI)
            unclamped = floor.add_(rectified(sigmoid))
            levels = unclamped.clamp(low, high)  # type: ignore[arg-type]  # both are numbers or both are tensors
            theta_gradient[tile] = (levels * gradient).sum(-1)
            v_gradient = logit_gradient(gradient, unclamped, levels, sigmoid, beta, penalty).flatten(1)
            torch.mm(v_gradient, a2_RI.t(), out=a1_gradient[tile])
            a2_gradient.addmm_(a1_OR.t(), v_gradient)
        return theta_gradient, a1_gradient, a2_gradient


def _launch_all(kernels: LoraKernels, device: torch.device) -> None:
    w_OI, scale_OG, a1_OR = (torch.ones(1, size, device=device) for size in (16, 1, 1))
    weight = LowRankWeight(w_OI, scale_OG, scale_OG, a1_OR, w_OI, -8.0, 7.0)
    kernels.forward(weight, torch.empty_like(w_OI))
    kernels.backward(weight, w_OI, 2.0, 0.0)


KERNELS: KernelSet[LoraKernels] = KernelSet(PlainKernels(), "cbqstream.rounding.lora_triton", _launch_all)
"""The kernels of lora_rounding."""
