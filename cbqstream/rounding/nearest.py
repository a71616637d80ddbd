"""Rounding to nearest: the baseline, and the method of experts that saw too few tokens to learn from."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from cbqstream.config import RoundingName
from cbqstream.numerics.affine import grouped, nearest_levels, row_tiles
from cbqstream.rounding.rounding import Rounding


class Nearest(Rounding):
    """A weight whose codes are the nearest ones for the starting scale. No window is trained."""

    name: ClassVar[RoundingName] = "nearest"
    learns = False

    @override
    def soft_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        w_OI, scale_OG1 = self.weight[rows], self.scale_of(rows).unsqueeze(-1)
        w_hat = self.scratch.take("weight", w_OI.shape, dtype, w_OI.device)
        for tile in row_tiles(w_OI):
            of_weight = slice(rows.start + tile.start, rows.start + tile.stop)
            levels = self.levels(of_weight, self.scale0[of_weight])
            torch.mul(levels, scale_OG1[tile], out=grouped(w_hat[tile], scale_OG1.shape[1]))
        return w_hat

    @override
    def levels(self, rows: slice, scale_OG: Tensor) -> Tensor:
        return nearest_levels(self.weight[rows], scale_OG, self.zero_point_of(rows), self.scheme)

    @override
    def gradients(self, rows: slice, gradient_OI: Tensor) -> tuple[Tensor, ...]:
        """Gradient of theta; d w_hat / d theta = w_hat. See `Rounding.gradients`."""
        w_hat = self.soft_rows(rows, torch.float32)
        return (grouped(w_hat * gradient_OI, self.scale0.shape[1]).sum(-1),)
