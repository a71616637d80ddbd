"""The two ways to learn rounding, and rounding to nearest, behind one interface. Formulas: `numerics/low_rank.py`, `straight_through.py`.

A rounding belongs to one linear layer, knows its weight and its starting grid, and computes the layer's products while it trains; when
that is done it gives the hard weight. What it remembers between windows is its `state`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cbqstream.config import ReconstructionConfig, Scheme
from cbqstream.numerics.affine import (
    clamp_levels,
    codes_of_levels,
    level_range,
    nearest_levels,
    row_tiles,
    storable_scale,
)
from cbqstream.numerics.low_rank import LowRank, low_rank_rise
from cbqstream.numerics.product import learned_product
from cbqstream.numerics.scratch import Scratch
from cbqstream.numerics.straight_through import Passes, StraightThrough, passes_for, rounded_levels
from cbqstream.records import QuantizedWeight

_BETA_START, _BETA_END, _WARM_UP = 20.0, 2.0, 0.2


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """Where training is."""

    progress: float
    """From 0 to 1 over the window."""
    rate_left: float
    """Share of the learning rates, from 1 to 0."""
    total: int
    """Steps of the window."""
    penalty: float
    """What the rounding penalty of one layer counts in the loss."""


class Rounding(nn.Module):
    """A weight on a grid whose step sizes are learned as `s = s0 * exp(theta)`. Here it is rounded to nearest, the baseline.

    Args:
        w_OI: the original weight, any float dtype; kept, not copied.
        scale_OG: s0, float32.
        zero_point_OG: int8, or None if symmetric.
        scheme: how the weight is stored.
    """

    scale0: Tensor
    zero_point: Tensor | None
    _carried: tuple[str, ...] = ("scale0", "zero_point", "theta")

    def __init__(self, w_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor | None, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.weight = w_OI
        self.register_buffer("scale0", scale_OG)
        self.register_buffer("zero_point", zero_point_OG)
        self.theta = nn.Parameter(torch.zeros_like(scale_OG))

    def begin_step(self, step: TrainingStep) -> None:
        """Called before every training step."""

    def soft(self) -> Tensor:
        """The weight to train with, float32 [O, I]."""
        levels = nearest_levels(self.weight, self.scale0, self.zero_point, self.scheme)
        return (levels * self._scale().unsqueeze(-1)).flatten(1)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output to train with, [..., O], for an input [..., I]; differentiable in it and in what is learned."""
        return functional.linear(x, self.soft().to(x.dtype), bias)

    def rounding_parameters(self) -> list[nn.Parameter]:
        """The rounding's own parameters for Adam, besides `theta`."""
        return []

    @torch.no_grad()
    def harden(self) -> QuantizedWeight:
        """The weight as it is stored and evaluated: the scale is rounded first, the codes are assigned after."""
        scale = storable_scale(self._scale())
        codes = torch.empty(self.weight.shape, dtype=torch.int8, device=self.weight.device)
        for rows in row_tiles(self.weight):
            codes[rows] = codes_of_levels(self._hard_levels(scale, rows), self._zero_point(rows))
        return QuantizedWeight(codes, scale, self.zero_point, self.scheme)

    @torch.no_grad()
    def changed(self) -> tuple[int, int]:
        """Codes that differ from rounding to nearest with the same scales, and all codes."""
        scale, moved = storable_scale(self._scale()), 0
        for rows in row_tiles(self.weight):
            nearest = nearest_levels(self.weight[rows], scale[rows], self._zero_point(rows), self.scheme)
            moved += int((self._hard_levels(scale, rows) != nearest).sum())
        return moved, self.weight.numel()

    def state(self) -> dict[str, Tensor]:
        """What a window that follows needs to go on, by name. Copies."""
        values = {name: getattr(self, name) for name in self._carried}
        return {name: value.detach().clone() for name, value in values.items() if value is not None}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, value in state.items():
            getattr(self, name).copy_(value)

    def _scale(self) -> Tensor:
        return self.scale0 * self.theta.exp()

    def _zero_point(self, rows: slice) -> Tensor | None:
        return None if self.zero_point is None else self.zero_point[rows]

    def _hard_levels(self, scale_OG: Tensor, rows: slice) -> Tensor:
        """Levels q - z of some rows with stored scales, float32 [O, G, K]."""
        return nearest_levels(self.weight[rows], scale_OG[rows], self._zero_point(rows), self.scheme)


class FullRounding(Rounding):
    """One value per weight, moved by sign-SGD inside the backward pass: two bytes a weight and no optimizer state."""

    v: Tensor
    _carried = (*Rounding._carried, "v")

    def __init__(
        self,
        w_OI: Tensor,
        scale_OG: Tensor,
        zero_point_OG: Tensor | None,
        scheme: Scheme,
        travel: float,
        passes: Passes,
        scratch: Scratch,
    ) -> None:
        super().__init__(w_OI, scale_OG, zero_point_OG, scheme)
        self.register_buffer("v", torch.zeros_like(w_OI, dtype=torch.float16))
        self._travel = travel
        self._passes = passes
        self._scratch = scratch
        self._step = 0.0

    def begin_step(self, step: TrainingStep) -> None:
        self._step = 2 * self._travel / step.total * step.rate_left

    def soft(self) -> Tensor:
        return self._weight().soft([self.theta.detach()], torch.float32).clone()

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return learned_product(x, self._weight(), bias, self.theta)

    def _weight(self) -> StraightThrough:
        bounds = level_range(self.scheme, self.zero_point)
        return StraightThrough(self.weight, self.scale0, self.v, *bounds, self._step, self._passes, self._scratch)

    def state(self) -> dict[str, Tensor]:
        """As above; values that are all zero, as they start, are left out."""
        state = super().state()
        if not self.v.any():
            del state["v"]
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        super().load(state)
        if "v" not in state:
            self.v.zero_()

    def _hard_levels(self, scale_OG: Tensor, rows: slice) -> Tensor:
        bounds = level_range(self.scheme, self._zero_point(rows))
        return rounded_levels(self.weight[rows], scale_OG[rows], self.v[rows], *bounds)


class LowRankRounding(Rounding):
    """AdaRound with a low-rank offset to the starting logits; trained by Adam, driven to 0 or 1 by the penalty."""

    _carried = (*Rounding._carried, "a1", "a2")

    def __init__(
        self,
        w_OI: Tensor,
        scale_OG: Tensor,
        zero_point_OG: Tensor | None,
        scheme: Scheme,
        rank: int,
        generator: torch.Generator,
        scratch: Scratch,
    ) -> None:
        super().__init__(w_OI, scale_OG, zero_point_OG, scheme)
        start = torch.randn(w_OI.shape[0], rank, generator=generator).to(w_OI.device) / math.sqrt(rank)
        self.a1 = nn.Parameter(start)
        self.a2 = nn.Parameter(torch.zeros(rank, w_OI.shape[1], device=w_OI.device))
        self._scratch = scratch
        self._beta, self._penalty = _BETA_START, 0.0

    def begin_step(self, step: TrainingStep) -> None:
        annealed = max(0.0, (step.progress - _WARM_UP) / (1 - _WARM_UP))
        self._beta = _BETA_START + (_BETA_END - _BETA_START) * annealed
        self._penalty = step.penalty

    @torch.no_grad()
    def soft(self) -> Tensor:
        return self._weight().soft([self.theta, self.a1, self.a2], torch.float32).clone()

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return learned_product(x, self._weight(), bias, self.theta, self.a1, self.a2)

    def _weight(self) -> LowRank:
        bounds = level_range(self.scheme, self.zero_point)
        penalty = self._penalty / self.weight.numel()
        return LowRank(self.weight, self.scale0, *bounds, self._beta, penalty, self._scratch)

    def rounding_parameters(self) -> list[nn.Parameter]:
        return [self.a1, self.a2]

    def _hard_levels(self, scale_OG: Tensor, rows: slice) -> Tensor:
        floor, rise = low_rank_rise(self.weight[rows], self.scale0[rows], self.a1[rows], self.a2)
        return clamp_levels(floor + (rise >= 0.5), *level_range(self.scheme, self._zero_point(rows)))


def make_rounding(
    w_OI: Tensor,
    scale_OG: Tensor,
    zero_point_OG: Tensor | None,
    scheme: Scheme,
    config: ReconstructionConfig,
    generator: torch.Generator,
    scratch: Scratch,
) -> Rounding:
    """The rounding that the settings ask for, at round-to-nearest."""
    if config.rounding == "full":
        passes = passes_for(config.kernels, w_OI.device)
        return FullRounding(w_OI, scale_OG, zero_point_OG, scheme, config.rounding_travel, passes, scratch)
    if config.rounding == "lora":
        return LowRankRounding(w_OI, scale_OG, zero_point_OG, scheme, config.rounding_rank, generator, scratch)
    return Rounding(w_OI, scale_OG, zero_point_OG, scheme)
