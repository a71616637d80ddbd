"""The interface of a rounding method: what it declares, and what it computes for one linear layer.

A `Rounding` belongs to one linear layer. It holds the layer's weight, the grid that the weight starts on, and the parameters that are
learned. The reconstruction of a window uses this interface alone and does not know which method it has.

A new method is a subclass in a file of its own and a row in `registry.py`; its settings are fields of `ReconstructionConfig`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from cbqstream.config import ReconstructionConfig, RoundingName
from cbqstream.numerics.affine import (
    Bound,
    codes_of_levels,
    level_range,
    nearest_levels,
    row_tiles,
    rows_of,
    storable_scale,
)
from cbqstream.records import QuantizedWeight
from cbqstream.rounding.cost import RoundingCost
from cbqstream.rounding.product import rounded_linear
from cbqstream.runtime.offload import Offloadable, OffloadedTensor
from cbqstream.runtime.scratch import Scratch
from cbqstream.scheme import Scheme


@dataclass(frozen=True, slots=True)
class RoundingStart:
    """Everything from which the rounding of a layer starts."""

    weight: Tensor
    """w [O, I], any float dtype; kept, not copied."""
    scale: Tensor
    """s0, float32 [O, G]."""
    zero_point: Tensor | None
    """z, int8 [O, G]; None if symmetric."""
    scheme: Scheme
    config: ReconstructionConfig
    generator: torch.Generator
    """For random starting values."""
    scratch: Scratch
    """Buffers for weights and gradients that are needed for a moment."""


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """Position of a training step within a window."""

    progress: float
    """From 0 at the first step to 1 after the last."""
    rate_left: float
    """Factor of the learning rates, from 1 to 0."""
    total: int
    """Steps of the window."""
    num_layers: int
    """Layers that are trained together."""


class Rounding(Offloadable, ABC):
    """A weight on a grid with learned scales, `s = s0 * exp(theta)`, and a learned choice of its codes.

    Args:
        start: the weight and its grid. At the start, the hard weight is rounded to nearest.
    """

    name: ClassVar[RoundingName]
    """Value of `ReconstructionConfig.rounding` that selects the method."""
    learns: ClassVar[bool] = True
    """Whether windows are trained at all."""
    closed_form: ClassVar[bool] = False
    """Whether codes are computed layer by layer from the inputs of the layers; then windows have one block."""
    learned: ClassVar[Mapping[str, bool]] = MappingProxyType({"theta": True})
    """Names of the parameters for Adam, and whether each has a row for every row of the weight."""

    scale0: Tensor
    zero_point: Tensor | None
    theta: nn.Parameter

    def __init__(self, start: RoundingStart) -> None:
        super().__init__()
        self.scheme = start.scheme
        self.weight = start.weight
        self.register_buffer("scale0", start.scale)
        self.register_buffer("zero_point", start.zero_point)
        self.theta = nn.Parameter(torch.zeros_like(start.scale))
        self.scratch = start.scratch

    # What a method declares.

    @classmethod
    def cost(cls, config: ReconstructionConfig, rows: int, columns: int) -> RoundingCost:
        """Cost of learning the rounding of a layer with a weight [rows, columns]."""
        return RoundingCost()

    @classmethod
    def require_runnable(cls, config: ReconstructionConfig, device: torch.device) -> None:
        """Refuse a machine on which the method cannot run, before a run starts.

        Raises:
            UsageError: something that the method needs is missing.
        """

    @classmethod
    def warning(cls, config: ReconstructionConfig, steps: int) -> str | None:
        """Reason why settings do not work well with this many training steps in a window, or None."""
        return None

    # What a method computes. `rows` is a slice of the rows of the weight; the weight is in memory.

    @abstractmethod
    def soft_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Rows of the weight to train with, w_hat in `dtype`, in a scratch buffer that the next call overwrites."""

    @abstractmethod
    def levels(self, rows: slice, scale_OG: Tensor) -> Tensor:
        """Levels q - z of rows of the hard weight, float32 [O, G, K], for the stored scales of these rows."""

    @abstractmethod
    def gradients(self, rows: slice, gradient_OI: Tensor) -> tuple[Tensor, ...]:
        """Gradients of all learned parameters of these rows, in the order of `learned`; may also apply a fused update.

        Args:
            rows: of the weight.
            gradient_OI: gradient of the loss for w_hat of these rows.
        """

    def begin_step(self, step: TrainingStep) -> None:
        """Prepare for a training step; called before every one."""

    # What every method has.

    @torch.no_grad()
    def soft(self) -> Tensor:
        """The whole weight to train with, float32 [O, I]."""
        with self.placed():
            return self.soft_rows(slice(0, self.weight.shape[0]), torch.float32).clone()

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ w_hat^T + bias`, [..., O] in the dtype of x [..., I]; differentiable in x and in the learned parameters."""
        return rounded_linear(x, self, bias, *self.learned_parameters())

    def learned_parameters(self) -> list[Tensor]:
        """The parameters for Adam, in the order of `learned`."""
        return [getattr(self, name) for name in self.learned]

    def rounding_parameters(self) -> list[Tensor]:
        """The parameters for Adam besides `theta`."""
        return [getattr(self, name) for name in self.learned if name != "theta"]

    @torch.no_grad()
    def harden(self) -> QuantizedWeight:
        """The weight as it is stored and evaluated: the scale is rounded first, then codes are assigned."""
        scale = self._stored_scale()
        with self.placed():
            codes = torch.empty(self.weight.shape, dtype=torch.int8, device=self.weight.device)
            for rows in row_tiles(self.weight):
                codes[rows] = codes_of_levels(self.levels(rows, scale[rows]), self.zero_point_of(rows))
        return QuantizedWeight(codes, scale, self.zero_point, self.scheme)

    @torch.no_grad()
    def changed(self) -> tuple[int, int]:
        """Number of codes that differ from rounding to nearest with the same scales, and number of all codes."""
        scale, moved = self._stored_scale(), 0
        with self.placed():
            for rows in row_tiles(self.weight):
                nearest = nearest_levels(self.weight[rows], scale[rows], self.zero_point_of(rows), self.scheme)
                moved += int((self.levels(rows, scale[rows]) != nearest).sum())
        return moved, self.weight.numel()

    def state(self) -> dict[str, Tensor]:
        """Copies of what the next window needs, by name, besides `large_state`."""
        values = {name: getattr(self, name) for name in ("scale0", "zero_point", *self.learned)}
        return {name: value.detach().clone() for name, value in values.items() if value is not None}

    def large_state(self) -> dict[str, Tensor | OffloadedTensor]:
        """The part of the state that is of the size of the weight, not copied; without what has not changed since the start."""
        return {}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` and `large_state` gave."""
        with self.placed():
            for name, value in state.items():
                getattr(self, name).copy_(value)

    def scale_of(self, rows: slice) -> Tensor:
        """Learned scales s0 exp(theta) of rows, float32 [O, G]."""
        return self.scale0[rows] * self.theta[rows].exp()

    def bounds(self, rows: slice) -> tuple[Bound, Bound]:
        """Smallest and largest level of rows, see `affine.level_range`."""
        low, high = level_range(self.scheme, self.zero_point)
        return rows_of(low, rows), rows_of(high, rows)

    def zero_point_of(self, rows: slice) -> Tensor | None:
        """Zero points of rows, int8 [O, G]; None if symmetric."""
        return None if self.zero_point is None else self.zero_point[rows]

    def _stored_scale(self) -> Tensor:
        return storable_scale(self.scale0 * self.theta.exp())
