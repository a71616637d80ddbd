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
        if self.phase is Phase.SOFT and self.rounding is not None:
            return linear_without_saved_weight(x, self.rounding, self.bias)
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
        return dequantize(self.rounding.harden())


def linear_without_saved_weight(x: Tensor, rounding: Rounding, bias: Tensor | None) -> Tensor:
    """The layer's product with the soft weight, which the backward pass computes again instead of keeping it.

    A soft weight is as large as the layer and cheap beside its products; kept, those of a window would be most of its memory.
    The parameters of the rounding do not change between the two computations, so both give the same bits.
    """
    w_hat = rounding.soft().to(x.dtype)
    storage = w_hat.untyped_storage().data_ptr()

    def pack(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        is_weight = saved.untyped_storage().data_ptr() == storage
        return (saved.size(), saved.stride()) if is_weight else saved

    def unpack(packed: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return rounding.soft().to(x.dtype).as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return functional.linear(x, w_hat, bias)


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
