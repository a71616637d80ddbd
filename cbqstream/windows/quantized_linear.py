"""A linear layer that can compute with its original, its soft or its hard weight, and can watch its inputs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum, auto

import torch
from torch import Tensor, nn

from cbqstream.config import Scheme
from cbqstream.numerics.activation_quant import quantize_per_tensor, quantize_per_token, starting_step
from cbqstream.numerics.affine import dequantize, storable_scale
from cbqstream.numerics.input_statistics import InputStatistics
from cbqstream.numerics.slabs import linear_in_slabs
from cbqstream.records import QuantizedWeight
from cbqstream.rounding.rounding import Rounding
from cbqstream.runtime.offload import Offloadable
from cbqstream.runtime.scratch import Scratch


class Phase(Enum):
    """Which weight a layer computes with."""

    ORIGINAL = auto()
    SOFT = auto()
    HARD = auto()


class InputStep(nn.Module):
    """One learned step size for all inputs of a layer, `s = s0 * exp(theta)`."""

    scale0: Tensor

    def __init__(self, scale0: Tensor, num_bits: int) -> None:
        super().__init__()
        self.num_bits = num_bits
        self.register_buffer("scale0", scale0)
        self.theta = nn.Parameter(torch.zeros_like(scale0))

    def soft(self, x: Tensor) -> Tensor:
        """The quantized input, differentiable."""
        return quantize_per_tensor(x, self.theta, self.scale0, self.num_bits)

    def hard(self, x: Tensor) -> Tensor:
        """The quantized input with the step size as it is stored."""
        return quantize_per_tensor(x, torch.zeros_like(self.theta), self.stored(), self.num_bits)

    @torch.no_grad()
    def stored(self) -> Tensor:
        """The step size as it is stored, float32 [1]."""
        return storable_scale(self.scale0 * self.theta.exp())

    def state(self) -> dict[str, Tensor]:
        """What a window that follows needs to go on, by name. Copies."""
        return {"scale0": self.scale0.clone(), "theta": self.theta.detach().clone()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.scale0.copy_(state["scale0"])
        self.theta.copy_(state["theta"])


class QuantizedLinear(Offloadable):
    """Stands in for an `nn.Linear` inside a block. The weight keeps the dtype it is stored in; products are in that of the input."""

    def __init__(self, linear: nn.Linear, scheme: Scheme, scratch: Scratch) -> None:
        super().__init__()
        self.scheme = scheme
        self._scratch = scratch
        self._finished: QuantizedWeight | None = None
        """Without its codes, which are in the place of the weight."""
        self.weight: Tensor = linear.weight.detach()
        self.bias = linear.bias
        self.rounding: Rounding | None = None
        self.phase = Phase.ORIGINAL
        self.input_step: InputStep | None = None
        self._watching = False
        self._sample_stride: int | None = None
        self._most_sampled: int | None = None
        self._watched: InputStatistics | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._watching:
            self._watch(x)
        if self.phase is not Phase.ORIGINAL:
            x = self._quantized_input(x)
        if self.phase is Phase.SOFT and self.rounding is not None:
            return self.rounding.product(x, self.bias)
        with self._rows() as make:
            return self._product(x, make)

    def _watch(self, x: Tensor) -> None:
        before = self._watched
        if before is not None and len(before.sample) == self._most_sampled:
            self._sample_stride = None
        seen = InputStatistics.of(x, self._sample_stride, 0 if before is None else before.tokens)
        seen = seen if before is None else before + seen
        self._watched = replace(seen, sample=seen.sample[: self._most_sampled])

    @contextmanager
    def _rows(self) -> Iterator[Callable[[slice, Tensor], Tensor]]:
        """What makes rows of the original or the hard weight, in the room that it gets for them if it likes."""
        if self.rounding is not None and self.phase is not Phase.ORIGINAL:
            hard = self.rounding.harden()
            yield lambda rows, room: dequantize(hard.rows(rows), room)
            return
        with self.placed():
            if self._finished is None:
                yield self._original_rows
            else:
                finished = replace(self._finished, codes=self.weight)
                yield lambda rows, room: dequantize(finished.rows(rows), room)

    def _original_rows(self, rows: slice, room: Tensor) -> Tensor:
        return self.weight[rows] if self.weight.dtype == room.dtype else room.copy_(self.weight[rows])

    def _product(self, x: Tensor, make: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """The layer's output with a weight whose rows `make` gives."""
        kept = x.requires_grad and torch.is_grad_enabled()  # then a backward pass needs them again

        def rows_of(rows: slice) -> Tensor:
            shape = self.weight[rows].shape
            if kept:
                return make(rows, torch.empty(shape, dtype=x.dtype, device=x.device))
            return make(rows, self._scratch.take("weight", shape, x.dtype, x.device))

        return linear_in_slabs(x, self.weight.shape, rows_of, self.bias)

    def watch_inputs(self, stride: int | None, most: int | None = None) -> None:
        """Start to gather statistics of the inputs, and every `stride`-th token (None is no tokens) until there are `most`."""
        self._watching, self._watched = True, None
        self._sample_stride, self._most_sampled = stride, most

    def take_statistics(self) -> InputStatistics:
        """What was seen since `watch_inputs`; gathering ends. A layer that never ran, as an expert may, has seen no token."""
        watched, self._watching, self._watched = self._watched, False, None
        if watched is not None:
            return watched
        with self.placed():
            none = self.weight.new_zeros(self.weight.shape[1], dtype=torch.float32)
        return InputStatistics(none.double(), none, none, none.new_empty(0, len(none)), 0)

    def start_input_step(self, statistics: InputStatistics) -> None:
        """Give the inputs a step size to learn, where the scheme has one."""
        bits = self.scheme.activation_bits
        if bits is not None and self.scheme.activation_strategy == "tensor":
            largest = torch.maximum(-statistics.low.min(), statistics.high.max())
            self.input_step = InputStep(starting_step(statistics.second_moment, largest, bits), bits)

    def freeze(self, weight: QuantizedWeight) -> None:
        """Compute with a finished weight from now on; the original and the rounding are let go."""
        self.rounding, self._finished = None, replace(weight, codes=weight.codes.to("meta"))
        self.put("weight", weight.codes)

    def _quantized_input(self, x: Tensor) -> Tensor:
        if self.input_step is not None:
            return self.input_step.soft(x) if self.phase is Phase.SOFT else self.input_step.hard(x)
        return x if self.scheme.activation_bits is None else quantize_per_token(x, self.scheme.activation_bits)


def replace_linears(block: nn.Module, schemes: Mapping[str, Scheme], scratch: Scratch) -> dict[str, QuantizedLinear]:
    """Put a `QuantizedLinear` in the place of each named linear layer of a block, and return them by name."""
    layers = {}
    for name, scheme in schemes.items():
        owner, _, leaf = name.rpartition(".")
        linear = block.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} is a {type(linear).__name__}, not a linear layer")
        layers[name] = QuantizedLinear(linear, scheme, scratch)
        setattr(block.get_submodule(owner), leaf, layers[name])
    return layers
