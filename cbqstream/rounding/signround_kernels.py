"""The two fused operations of signround on a weight: forward, and backward with the update of the rounding values.

`PlainKernels` uses torch alone, in tiles of rows that fit in the cache. On CUDA, `signround_triton.py` has each operation as one kernel.
"""

from typing import Protocol

import torch
from torch import Tensor

from cbqstream.numerics.affine import Bound, grouped, row_tiles, rows_of
from cbqstream.numerics.signround import rounded_levels, updated
from cbqstream.rounding.kernels import KernelSet


class SignRoundKernels(Protocol):
    """The fused operations. Formulas: `numerics/signround.py`. Scales are s, float32 [O, G]."""

    def forward(self, w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound, out_OI: Tensor) -> None:
        """Write w_hat into `out_OI`, in its dtype."""
        ...

    def backward_update(
        self, w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound, gradient_OI: Tensor, step: float
    ) -> Tensor:
        """Gradient of theta, float32 [O, G], from the gradient of w_hat. v moves in place by `step` against the sign of its gradient."""
        ...


class PlainKernels:
    """The operations with torch alone, on any device."""

    def forward(self, w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound, out_OI: Tensor) -> None:
        """See `SignRoundKernels`."""
        scale_OG1, groups = scale_OG.unsqueeze(-1), scale_OG.shape[1]
        for rows in row_tiles(w_OI):
            levels = rounded_levels(w_OI[rows], scale_OG[rows], v_OI[rows], rows_of(low, rows), rows_of(high, rows))
            torch.mul(levels, scale_OG1[rows], out=grouped(out_OI[rows], groups))

    def backward_update(
        self, w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound, gradient_OI: Tensor, step: float
    ) -> Tensor:
        """See `SignRoundKernels`."""
        gradient_OG = torch.empty_like(scale_OG)
        for rows in row_tiles(w_OI):
            bounds = rows_of(low, rows), rows_of(high, rows)
            gradient_OG[rows], v_OI[rows] = updated(
                w_OI[rows], scale_OG[rows], v_OI[rows], *bounds, gradient_OI[rows], step
            )
        return gradient_OG


def _launch_all(kernels: SignRoundKernels, device: torch.device) -> None:
    w_OI, scale_OG = torch.zeros(1, 16, device=device), torch.ones(1, 1, device=device)
    kernels.forward(w_OI, scale_OG, w_OI.half(), -8.0, 7.0, torch.empty_like(w_OI))
    kernels.backward_update(w_OI, scale_OG, w_OI.half(), -8.0, 7.0, w_OI, 0.0)


KERNELS: KernelSet[SignRoundKernels] = KernelSet(PlainKernels(), "cbqstream.rounding.signround_triton", _launch_all)
"""The kernels of signround."""
