"""Rounding method `signround`: one learned value per weight, moved by sign-SGD inside the backward pass.

Formulas: `numerics/signround.py`. The method keeps two bytes per weight and no optimizer state.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from cbqstream.config import ReconstructionConfig
from cbqstream.numerics.affine import device_tile_bytes
from cbqstream.numerics.signround import rounded_levels
from cbqstream.rounding.cost import RoundingCost
from cbqstream.rounding.rounding import Rounding, RoundingStart, TrainingStep
from cbqstream.rounding.signround_kernels import KERNELS
from cbqstream.runtime.offload import OffloadedTensor

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

    def __init__(self, start: RoundingStart) -> None:
        super().__init__(start)
        self.register_buffer("v", torch.zeros_like(start.weight, dtype=torch.float16))
        self._max_shift = start.config.max_shift
        self._kernels = KERNELS.chosen(start.config.kernels, start.weight.device)
        self._step = 0.0

    @classmethod
    @override
    def cost(cls, config: ReconstructionConfig, rows: int, columns: int) -> RoundingCost:
        weights = rows * columns
        values = _VALUE_BYTES * weights
        return RoundingCost(
            resident_bytes=values,
            state_bytes=values,
            offloaded_bytes=values,
            step_bytes=_STEP_BYTES * weights,
            step_flop=_STEP_FLOP * weights,
            tile_bytes=device_tile_bytes(weights) if config.kernels == "plain" else 0,
        )

    @classmethod
    @override
    def require_runnable(cls, config: ReconstructionConfig, device: torch.device) -> None:
        KERNELS.require(config.kernels, device)

    @classmethod
    @override
    def warning(cls, config: ReconstructionConfig, steps: int) -> str | None:
        if config.max_shift >= _SMALLEST_MOVE * steps:
            return None
        return f"{steps:,} steps a window: 16-bit rounding values do not follow such small steps. Use a larger --batch-size."

    @override
    def begin_step(self, step: TrainingStep) -> None:
        self._step = 2 * self._max_shift / step.total * step.rate_left  # rates fall to zero: their mean is a half

    @override
    def soft_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        w_OI, (low, high) = self.weight[rows], self.bounds(rows)
        w_hat = self.scratch.take("weight", w_OI.shape, dtype, w_OI.device)
        self._kernels.forward(w_OI, self.scale_of(rows), self.v[rows], low, high, w_hat)
        return w_hat

    @override
    def levels(self, rows: slice, scale_OG: Tensor) -> Tensor:
        return rounded_levels(self.weight[rows], scale_OG, self.v[rows], *self.bounds(rows))

    @override
    def gradients(self, rows: slice, gradient_OI: Tensor) -> tuple[Tensor, ...]:
        """Gradient of theta; v moves. See `Rounding.gradients`."""
        weight, scale, v = self.weight[rows], self.scale_of(rows), self.v[rows]
        return (self._kernels.backward_update(weight, scale, v, *self.bounds(rows), gradient_OI, self._step),)

    @override
    def large_state(self) -> dict[str, Tensor | OffloadedTensor]:
        with self.placed():
            moved = bool(self.v.any())
        return {"v": self.offloaded("v") or self.v} if moved else {}

    @override
    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        if "v" not in state:
            with self.placed():
                self.v.zero_()
