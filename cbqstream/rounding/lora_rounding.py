"""Rounding method `lora_rounding`: AdaRound whose logits have a learned low-rank offset (LoRA-Rounding of CBQ, arXiv 2312.07950).

The logits are V0 + A1 A2. V0 is the logit at which the soft weight equals the original one. Adam trains A1, A2 and the logarithm theta of
the scales. A penalty drives each weight to round either up or down. Formulas: `numerics/adaround.py`.
"""

import math
from types import MappingProxyType

import torch
from torch import Tensor, nn
from typing_extensions import override

from cbqstream.config import ReconstructionConfig
from cbqstream.numerics.adaround import floor_and_sigmoid, rectified
from cbqstream.numerics.affine import clamp_levels, device_tile_bytes
from cbqstream.rounding.cost import RoundingCost
from cbqstream.rounding.lora_kernels import KERNELS, PARTIAL_SUMS, LowRankWeight
from cbqstream.rounding.rounding import Rounding, RoundingStart, TrainingStep

_BETA_START, _BETA_END, _WARM_UP = 20.0, 2.0, 0.2
_FACTOR_BYTES = 16  # value, gradient and two moments of Adam, float32
_STEP_BYTES = 600  # with torch alone: every operation reads and writes a tile of float32 values
_FUSED_BYTES = 12  # with Triton: w and w_hat twice, w and the gradient once, in bf16
# and for each rank: a sum of the 16 rows and of the 128 columns of a tile, written and read
_SUMS_BYTES = 8 / 16 + 8 / 128
_STEP_FLOP = 90


class LoraRounding(Rounding):
    """A weight with the rounding logits V0 + A1 A2."""

    name = "lora_rounding"
    learned = MappingProxyType(
        {"theta": True, "a1": True, "a2": False}
    )  # whether it has a row for every row of the weight

    def __init__(self, start: RoundingStart) -> None:
        super().__init__(start)
        (rows, columns), rank, device = start.weight.shape, start.config.rounding_rank, start.weight.device
        self.a1 = nn.Parameter(torch.randn(rows, rank, generator=start.generator).to(device) / math.sqrt(rank))
        """A1, float32 [O, R]."""
        self.a2 = nn.Parameter(torch.zeros(rank, columns, device=device))
        """A2, float32 [R, I]; zero at the start."""
        self._kernels = KERNELS.chosen(start.config.kernels, start.weight.device)
        self._penalty_weight = start.config.penalty_weight
        self._beta, self._penalty_per_weight = _BETA_START, 0.0

    @classmethod
    @override
    def cost(cls, config: ReconstructionConfig, rows: int, columns: int) -> RoundingCost:
        factors = config.rounding_rank * (rows + columns)
        weights, sums = rows * columns, rows * columns * _SUMS_BYTES / 2 * config.rounding_rank
        products = 10 * config.rounding_rank  # A1 A2 three times in a step, and the gradients of A1 and A2
        return RoundingCost(
            resident_bytes=_FACTOR_BYTES * factors,
            state_bytes=4 * factors,
            step_bytes=weights * _STEP_BYTES,
            step_flop=weights * (_STEP_FLOP + products),
            fused_step_bytes=int(weights * _FUSED_BYTES + 2 * sums),
            tile_bytes=device_tile_bytes(weights) if config.kernels == "plain" else min(int(sums), 4 * PARTIAL_SUMS),
        )

    @classmethod
    @override
    def require_runnable(cls, config: ReconstructionConfig, device: torch.device) -> None:
        KERNELS.require(config.kernels, device)

    @override
    def begin_step(self, step: TrainingStep) -> None:
        annealed = max(0.0, (step.progress - _WARM_UP) / (1 - _WARM_UP))
        self._beta = _BETA_START + (_BETA_END - _BETA_START) * annealed
        self._penalty_per_weight = self._penalty_weight / step.num_layers / self.weight.numel()

    @override
    def soft_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        w_hat = self.scratch.take("weight", self.weight[rows].shape, dtype, self.weight.device)
        self._kernels.forward(self._low_rank(rows), w_hat)
        return w_hat

    @override
    def levels(self, rows: slice, scale_OG: Tensor) -> Tensor:
        """Levels for the starting scale; `scale_OG` is not used. See `Rounding.levels`."""
        floor, sigmoid = floor_and_sigmoid(self.weight[rows], self.scale0[rows], self.a1[rows], self.a2)
        return clamp_levels(floor + (rectified(sigmoid) >= 0.5), *self.bounds(rows))

    @override
    def gradients(self, rows: slice, gradient_OI: Tensor) -> tuple[Tensor, ...]:
        """Gradients of theta, A1 and A2. See `Rounding.gradients`."""
        return self._kernels.backward(self._low_rank(rows), gradient_OI, self._beta, self._penalty_per_weight)

    def _low_rank(self, rows: slice) -> LowRankWeight:
        scales = self.scale0[rows], self.scale_of(rows)
        return LowRankWeight(self.weight[rows], *scales, self.a1[rows], self.a2, *self.bounds(rows))
