"""Rounding method `signround`: one learned value per weight, moved by sign-SGD inside the backward pass.

Formulas: `numerics/signround.py`. The method keeps two bytes per weight and no optimizer state.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from cbqstream.config import ReconstructionConfig
from cbqstream.numerics.affine import level_range, rows_of
from cbqstream.numerics.signround import rounded_levels
from cbqstream.rounding.cost import RoundingCost
from cbqstream.rounding.rounding import Rounding, TrainingStep
from cbqstream.rounding.signround_kernels import SignRoundKernels, kernels_for, require_kernels
from cbqstream.runtime.offload import OffloadedTensor
from cbqstream.runtime.scratch import Scratch
from cbqstream.scheme import Scheme

_VALUE_BYTES = 2  # float16
_STEP_BYTES = 20  # forward twice: w, v, w_hat in bf16; backward_update: w, v, the gradient, and v again
_STEP_FLOP = 30
_SMALLEST_MOVE = 1e-4
"""Mean step that float16 rounding values still follow. With a shift of 0.25 in 2,688 steps they move 1 % less than they should in a first
window and 5 % less in a second; in 4,480 steps a quarter and a half less."""


class SignRound(Rounding):
    """A weight whose rounding values v move by the sign of their gradient."""

    name = "signround"
    large = ("weight", "v")
    v: Tensor
    """Rounding values, float16 [O, I], in [-1/2, 1/2]."""

    def __init__(
        self,
        w_OI: Tensor,
        scale_OG: Tensor,
        zero_point_OG: Tensor | None,
        scheme: Scheme,
        scratch: Scratch,
        max_shift: float,
        kernels: SignRoundKernels,
    ) -> None:
        super().__init__(w_OI, scale_OG, zero_point_OG, scheme, scratch)
        self.register_buffer("v", torch.zeros_like(w_OI, dtype=torch.float16))
        self._max_shift = max_shift
        self._kernels = kernels
        self._step = 0.0

    @classmethod
    def start(
        cls,
        w_OI: Tensor,
        grid: tuple[Tensor, Tensor | None],
        scheme: Scheme,
        config: ReconstructionConfig,
        generator: torch.Generator,
        scratch: Scratch,
    ) -> Self:
        return cls(w_OI, *grid, scheme, scratch, config.max_shift, kernels_for(config.kernels, w_OI.device))

    @classmethod
    def cost(cls, config: ReconstructionConfig, rows: int, columns: int) -> RoundingCost:
        weights = rows * columns
        values = _VALUE_BYTES * weights
        return RoundingCost(values, values, values, _STEP_BYTES * weights, _STEP_FLOP * weights)

    @classmethod
    def require_runnable(cls, config: ReconstructionConfig, device: torch.device) -> None:
        require_kernels(config.kernels, device)

    @classmethod
    def warning(cls, config: ReconstructionConfig, steps: int) -> str | None:
        if config.max_shift >= _SMALLEST_MOVE * steps:
            return None
        return f"{steps:,} steps a window: 16-bit rounding values do not follow such small steps. Use a larger --batch-size."

    def begin_step(self, step: TrainingStep) -> None:
        self._step = 2 * self._max_shift / step.total * step.rate_left  # rates fall to zero: their mean is a half

    def soft_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        w_OI, (low, high) = self.weight[rows], self._bounds(rows)
        w_hat = self.scratch.take("weight", w_OI.shape, dtype, w_OI.device)
        self._kernels.forward(w_OI, self.scale_of(rows), self.v[rows], low, high, w_hat)
        return w_hat

    def levels(self, rows: slice, scale_OG: Tensor) -> Tensor:
        return rounded_levels(self.weight[rows], scale_OG, self.v[rows], *self._bounds(rows))

    def gradients(self, rows: slice, gradient_OI: Tensor) -> tuple[Tensor, ...]:
        """Gradient of theta; v moves. See `Rounding.gradients`."""
        weight, scale, v = self.weight[rows], self.scale_of(rows), self.v[rows]
        return (self._kernels.backward_update(weight, scale, v, *self._bounds(rows), gradient_OI, self._step),)

    def large_state(self) -> dict[str, Tensor | OffloadedTensor]:
        with self.placed():
            moved = bool(self.v.any())
        return {"v": self.offloaded("v") or self.v} if moved else {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        if "v" not in state:
            with self.placed():
                self.v.zero_()

    def _bounds(self, rows: slice) -> tuple[Tensor | float, Tensor | float]:
        low, high = level_range(self.scheme, self.zero_point)
        return rows_of(low, rows), rows_of(high, rows)
