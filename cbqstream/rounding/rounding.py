"""The two ways to learn rounding, and rounding to nearest, behind one interface. Formulas: `rounding/low_rank.py`, `straight_through.py`.

A rounding belongs to one linear layer, knows its weight and its starting grid, and computes the layer's products while it trains; when
that is done it gives the hard weight. What it remembers between windows is its `state`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cbqstream.config import ReconstructionConfig, Scheme
from cbqstream.numerics.affine import codes_of_levels, level_range, row_tiles, storable_scale
from cbqstream.records import QuantizedWeight
from cbqstream.rounding.low_rank import LowRank
from cbqstream.rounding.product import LearnedWeight, Nearest, learned_product, parameters_of
from cbqstream.rounding.straight_through import Passes, StraightThrough, passes_for
from cbqstream.runtime.offload import Offloadable, OffloadedTensor
from cbqstream.runtime.scratch import Scratch

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


class Rounding(Offloadable):
    """A weight on a grid whose step sizes are learned as `s = s0 * exp(theta)`. Here it is rounded to nearest, the baseline.

    Args:
        w_OI: the original weight, any float dtype; kept, not copied.
        scale_OG: s0, float32.
        zero_point_OG: int8, or None if symmetric.
        scheme: how the weight is stored.
        scratch: where weights lie for a moment.
    """

    scale0: Tensor
    zero_point: Tensor | None
    _carried: tuple[str, ...] = ("scale0", "zero_point", "theta")

    def __init__(
        self, w_OI: Tensor, scale_OG: Tensor, zero_point_OG: Tensor | None, scheme: Scheme, scratch: Scratch
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.weight = w_OI
        self.register_buffer("scale0", scale_OG)
        self.register_buffer("zero_point", zero_point_OG)
        self.theta = nn.Parameter(torch.zeros_like(scale_OG))
        self._scratch = scratch

    def begin_step(self, step: TrainingStep) -> None:
        """Called before every training step."""

    @torch.no_grad()
    def soft(self) -> Tensor:
        """The weight to train with, float32 [O, I]."""
        with self._place() as weight:
            return weight.soft(self._learned(), torch.float32).clone()

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output to train with, [..., O], for an input [..., I]; differentiable in it and in what is learned."""
        return learned_product(x, self._place, bias, *self._learned())

    def rounding_parameters(self) -> list[nn.Parameter]:
        """The rounding's own parameters for Adam, besides `theta`."""
        return []

    @torch.no_grad()
    def harden(self) -> QuantizedWeight:
        """The weight as it is stored and evaluated: the scale is rounded first, the codes are assigned after."""
        scale = storable_scale(self._scale())
        with self._place() as weight:
            codes = torch.empty(self.weight.shape, dtype=torch.int8, device=self.weight.device)
            for rows in row_tiles(self.weight):
                zero_point = None if self.zero_point is None else self.zero_point[rows]
                codes[rows] = codes_of_levels(_levels(weight, self._learned(), scale, rows), zero_point)
        return QuantizedWeight(codes, scale, self.zero_point, self.scheme)

    @torch.no_grad()
    def changed(self) -> tuple[int, int]:
        """Codes that differ from rounding to nearest with the same scales, and all codes."""
        scale, moved = storable_scale(self._scale()), 0
        with self._place() as weight:
            nearest = self._nearest(scale)
            for rows in row_tiles(self.weight):
                levels = _levels(weight, self._learned(), scale, rows)
                moved += int((levels != _levels(nearest, [self.theta], scale, rows)).sum())
        return moved, self.weight.numel()

    def state(self) -> dict[str, Tensor]:
        """What a window that follows needs to go on, by name, besides `large_state`. Copies."""
        values = {name: getattr(self, name) for name in self._carried}
        return {name: value.detach().clone() for name, value in values.items() if value is not None}

    def large_state(self) -> dict[str, Tensor | OffloadedTensor]:
        """The part of it that is of the size of the weight, itself, or where it lies; without what is as it was at the start."""
        return {}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        with self.placed():
            for name, value in state.items():
                getattr(self, name).copy_(value)

    def _scale(self) -> Tensor:
        return self.scale0 * self.theta.exp()

    @contextmanager
    def _place(self) -> Iterator[LearnedWeight]:
        """The weight that is learned, in memory for the length of a `with`."""
        with self.placed():
            yield self._weight()

    def _weight(self) -> LearnedWeight:
        return self._nearest(self.scale0)

    def _nearest(self, scale_OG: Tensor) -> Nearest:
        return Nearest(self.weight, scale_OG, self.zero_point, self.scheme, self._scratch)

    def _learned(self) -> list[Tensor]:
        """The parameters of `_weight`."""
        return [self.theta]


def _levels(weight: LearnedWeight, parameters: Sequence[Tensor], scale_OG: Tensor, rows: slice) -> Tensor:
    """Levels q - z of some rows with stored scales, float32 [O, G, K]."""
    return weight.part(rows).levels(parameters_of(weight, parameters, rows), scale_OG[rows])


class FullRounding(Rounding):
    """One value per weight, moved by sign-SGD inside the backward pass: two bytes a weight and no optimizer state."""

    v: Tensor
    large = ("weight", "v")

    def __init__(
        self,
        w_OI: Tensor,
        scale_OG: Tensor,
        zero_point_OG: Tensor | None,
        scheme: Scheme,
        scratch: Scratch,
        max_shift: float,
        passes: Passes,
    ) -> None:
        super().__init__(w_OI, scale_OG, zero_point_OG, scheme, scratch)
        self.register_buffer("v", torch.zeros_like(w_OI, dtype=torch.float16))
        self._max_shift = max_shift
        self._passes = passes
        self._step = 0.0

    def begin_step(self, step: TrainingStep) -> None:
        self._step = 2 * self._max_shift / step.total * step.rate_left

    def _weight(self) -> LearnedWeight:
        bounds = level_range(self.scheme, self.zero_point)
        return StraightThrough(self.weight, self.scale0, self.v, *bounds, self._step, self._passes, self._scratch)

    def large_state(self) -> dict[str, Tensor | OffloadedTensor]:
        """See `Rounding`."""
        with self.placed():
            moved = bool(self.v.any())
        return {"v": self.page("v") or self.v} if moved else {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        super().load(state)
        if "v" not in state:
            with self.placed():
                self.v.zero_()


class LowRankRounding(Rounding):
    """AdaRound with a low-rank offset to the starting logits; trained by Adam, driven to 0 or 1 by the penalty."""

    _carried = (*Rounding._carried, "a1", "a2")

    def __init__(
        self,
        w_OI: Tensor,
        scale_OG: Tensor,
        zero_point_OG: Tensor | None,
        scheme: Scheme,
        scratch: Scratch,
        rank: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(w_OI, scale_OG, zero_point_OG, scheme, scratch)
        start = torch.randn(w_OI.shape[0], rank, generator=generator).to(w_OI.device) / math.sqrt(rank)
        self.a1 = nn.Parameter(start)
        self.a2 = nn.Parameter(torch.zeros(rank, w_OI.shape[1], device=w_OI.device))
        self._beta, self._penalty = _BETA_START, 0.0

    def begin_step(self, step: TrainingStep) -> None:
        annealed = max(0.0, (step.progress - _WARM_UP) / (1 - _WARM_UP))
        self._beta = _BETA_START + (_BETA_END - _BETA_START) * annealed
        self._penalty = step.penalty

    def _weight(self) -> LearnedWeight:
        bounds = level_range(self.scheme, self.zero_point)
        penalty = self._penalty / self.weight.numel()
        return LowRank(self.weight, self.scale0, *bounds, self._beta, penalty, self._scratch)

    def _learned(self) -> list[Tensor]:
        return [self.theta, self.a1, self.a2]

    def rounding_parameters(self) -> list[nn.Parameter]:
        return [self.a1, self.a2]


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
    grid = (scale_OG, zero_point_OG, scheme, scratch)
    if config.rounding == "signround":
        return FullRounding(w_OI, *grid, config.max_shift, passes_for(config.kernels, w_OI.device))
    if config.rounding == "lora_rounding":
        return LowRankRounding(w_OI, *grid, config.rounding_rank, generator)
    return Rounding(w_OI, *grid)
