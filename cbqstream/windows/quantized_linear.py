"""A linear layer that can compute with its original, its soft or its hard weight, and can watch its inputs."""

from enum import Enum, auto

import torch
from torch import Tensor, nn
from torch.nn import functional

from cbqstream.numerics.affine import dequantize
from cbqstream.records import QuantizedWeight
from cbqstream.windows.rounding import Rounding


class Phase(Enum):
    """Which weight a layer computes with."""

    ORIGINAL = auto()
    SOFT = auto()
    HARD = auto()


class QuantizedLinear(nn.Module):
    """Stands in for an `nn.Linear` inside a block. The weight keeps the dtype it is stored in; products are in that of the input."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor = linear.weight.detach()
        self.bias = linear.bias
        self.rounding: Rounding | None = None
        self.phase = Phase.ORIGINAL
        self._squares_I: Tensor | None = None
        self._rows = 0

    def forward(self, x: Tensor) -> Tensor:
        if self._squares_I is not None:
            rows = x.detach().flatten(0, -2)
            self._squares_I += rows.float().square().sum(0, dtype=torch.float64)
            self._rows += len(rows)
        return functional.linear(x, self._active_weight().to(x.dtype), self.bias)

    def watch_inputs(self) -> None:
        """Start to gather the second moment of the inputs."""
        self._squares_I = torch.zeros(self.weight.shape[1], dtype=torch.float64, device=self.weight.device)

    def second_moment(self) -> Tensor:
        """E[x^2] per input column since `watch_inputs`, float32 [I]; gathering ends.

        Raises:
            RuntimeError: nothing was gathered.
        """
        if self._squares_I is None or not self._rows:
            raise RuntimeError("second_moment() without watch_inputs() and a forward pass")
        moment, self._squares_I, self._rows = (self._squares_I / self._rows).float(), None, 0
        return moment

    def freeze(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        """Compute with a finished weight from now on; the original and the rounding are let go."""
        self.weight, self.rounding = dequantize(weight).to(dtype), None

    def _active_weight(self) -> Tensor:
        if self.phase is Phase.ORIGINAL or self.rounding is None:
            return self.weight
        return self.rounding.soft() if self.phase is Phase.SOFT else dequantize(self.rounding.harden())


def replace_linears(block: nn.Module, names: tuple[str, ...]) -> dict[str, QuantizedLinear]:
    """Put a `QuantizedLinear` in the place of each named linear layer of a block, and return them by name."""
    layers = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        linear = block.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} is a {type(linear).__name__}, not a linear layer")
        layers[name] = QuantizedLinear(linear)
        setattr(block.get_submodule(owner), leaf, layers[name])
    return layers
