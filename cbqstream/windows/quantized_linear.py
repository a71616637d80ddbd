"""A linear layer that can compute with its original, its soft or its hard weight, and can watch its inputs."""

from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor, nn
from torch.nn import functional

from cbqstream.numerics.affine import dequantize
from cbqstream.numerics.per_token import quantize_per_token
from cbqstream.records import QuantizedWeight
from cbqstream.windows.rounding import Rounding


class Phase(Enum):
    """Which weight a layer computes with."""

    ORIGINAL = auto()
    SOFT = auto()
    HARD = auto()


@dataclass(slots=True)
class InputStatistics:
    """Per input column [I], over all tokens seen: sum of squares (float64), smallest and largest value (float32)."""

    squares: Tensor
    low: Tensor
    high: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, columns: int, device: torch.device) -> "InputStatistics":
        """Nothing seen yet."""
        zeros = torch.zeros(columns, device=device)
        return cls(zeros.double(), zeros, zeros)

    def add(self, x: Tensor) -> None:
        """Take in a batch [..., I]."""
        rows = x.detach().flatten(0, -2).float()
        self.squares += rows.square().sum(0, dtype=torch.float64)
        self.low = torch.minimum(self.low, rows.amin(0))
        self.high = torch.maximum(self.high, rows.amax(0))
        self.tokens += len(rows)

    def divided(self, scale_I: Tensor) -> "InputStatistics":
        """What they would be had the inputs been divided by a scale per column."""
        squares = self.squares / scale_I.double().square()
        return InputStatistics(squares, self.low / scale_I, self.high / scale_I, self.tokens)

    @property
    def second_moment(self) -> Tensor:
        """E[x^2], float32 [I]."""
        return (self.squares / self.tokens).float()


class QuantizedLinear(nn.Module):
    """Stands in for an `nn.Linear` inside a block. The weight keeps the dtype it is stored in; products are in that of the input."""

    def __init__(self, linear: nn.Linear, activation_bits: int | None) -> None:
        super().__init__()
        self.weight: Tensor = linear.weight.detach()
        self.bias = linear.bias
        self.rounding: Rounding | None = None
        self.phase = Phase.ORIGINAL
        self.activation_bits = activation_bits
        self._watched: InputStatistics | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._watched is not None:
            self._watched.add(x)
        if self.phase is Phase.ORIGINAL:
            return functional.linear(x, self.weight.to(x.dtype), self.bias)
        if self.activation_bits is not None:
            x = quantize_per_token(x, self.activation_bits)
        if self.rounding is None:
            return functional.linear(x, self.weight.to(x.dtype), self.bias)
        if self.phase is Phase.SOFT:
            return linear_without_saved_weight(x, self.rounding, self.bias)
        return functional.linear(x, dequantize(self.rounding.harden()).to(x.dtype), self.bias)

    def watch_inputs(self) -> None:
        """Start to gather statistics of the inputs."""
        self._watched = InputStatistics.empty(self.weight.shape[1], self.weight.device)

    def take_statistics(self) -> InputStatistics:
        """What was seen since `watch_inputs`; gathering ends.

        Raises:
            RuntimeError: nothing was seen.
        """
        watched, self._watched = self._watched, None
        if watched is None or not watched.tokens:
            raise RuntimeError("take_statistics() without watch_inputs() and a forward pass")
        return watched

    def freeze(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        """Compute with a finished weight from now on; the original and the rounding are let go."""
        self.weight, self.rounding = dequantize(weight).to(dtype), None


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


def replace_linears(
    block: nn.Module, names: tuple[str, ...], activation_bits: int | None
) -> dict[str, QuantizedLinear]:
    """Put a `QuantizedLinear` in the place of each named linear layer of a block, and return them by name."""
    layers = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        linear = block.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} is a {type(linear).__name__}, not a linear layer")
        layers[name] = QuantizedLinear(linear, activation_bits)
        setattr(block.get_submodule(owner), leaf, layers[name])
    return layers
