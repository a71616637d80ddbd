"""A linear layer that can compute with its original, soft or hard weight, and can gather statistics of its inputs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum, auto

import torch
from torch import Tensor, nn

from cbqstream.numerics.activation_quant import quantize_per_token, starting_step
from cbqstream.numerics.affine import dequantize
from cbqstream.numerics.input_statistics import InputStatistics
from cbqstream.numerics.slabs import linear_in_slabs
from cbqstream.records import QuantizedWeight
from cbqstream.rounding.rounding import Rounding
from cbqstream.runtime.offload import Offloadable
from cbqstream.runtime.scratch import Scratch
from cbqstream.scheme import Scheme
from cbqstream.windows.input_step import InputStep


class Phase(Enum):
    """The weight that a layer computes with."""

    ORIGINAL = auto()
    """The weight of the source."""
    SOFT = auto()
    """The weight that is trained."""
    HARD = auto()
    """The weight as it would be exported."""


class QuantizedLinear(Offloadable):
    """A layer that replaces an `nn.Linear` in a block. The weight keeps its stored dtype; products have the dtype of the input.

    Args:
        linear: the layer that is replaced.
        scheme: scheme of the layer.
        scratch: buffers for weights that are needed for a moment.
    """

    def __init__(self, linear: nn.Linear, scheme: Scheme, scratch: Scratch) -> None:
        super().__init__()
        self.scheme = scheme
        self._scratch = scratch
        self._finished: QuantizedWeight | None = None
        """The finished weight without its codes, which then replace `weight`."""
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
        """The output [..., O] for inputs [..., I], with the weight of the current phase."""
        if self._watching:
            self._watch(x)
        if self.phase is not Phase.ORIGINAL:
            x = self.quantized_input(x)
        if self.phase is Phase.SOFT and self.rounding is not None:
            return self.rounding.product(x, self.bias)
        with self._rows() as make:
            return self._product(x, make)

    def _watch(self, x: Tensor) -> None:
        """Add inputs to the statistics."""
        before = self._watched
        if before is not None and len(before.sample) == self._most_sampled:
            self._sample_stride = None
        tokens_before = 0 if before is None else before.tokens
        seen = InputStatistics.of(x, self._sample_stride, tokens_before)
        seen = seen if before is None else before + seen
        self._watched = replace(seen, sample=seen.sample[: self._most_sampled])

    @contextmanager
    def _rows(self) -> Iterator[Callable[[slice, Tensor], Tensor]]:
        """Function that makes rows of the original or the hard weight; it may write them into the tensor that is its second argument."""
        if self.rounding is not None and self.phase is not Phase.ORIGINAL:
            hard = self.rounding.harden()
            yield lambda rows, out: dequantize(hard.rows(rows), out)
            return
        with self.placed():
            if self._finished is None:
                yield self._original_rows
            else:
                finished = replace(self._finished, codes=self.weight)
                yield lambda rows, out: dequantize(finished.rows(rows), out)

    def _original_rows(self, rows: slice, out: Tensor) -> Tensor:
        return self.weight[rows] if self.weight.dtype == out.dtype else out.copy_(self.weight[rows])

    def _product(self, x: Tensor, make: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """The output of the layer with the weight whose rows `make` gives."""
        kept = x.requires_grad and torch.is_grad_enabled()  # then the backward pass needs the rows again

        def rows_of(rows: slice) -> Tensor:
            shape = self.weight[rows].shape
            if kept:
                return make(rows, torch.empty(shape, dtype=x.dtype, device=x.device))
            return make(rows, self._scratch.take("weight", shape, x.dtype, x.device))

        return linear_in_slabs(x, self.weight.shape, rows_of, self.bias)

    def watch_inputs(self, stride: int | None, most: int | None = None) -> None:
        """Start to gather statistics of the inputs.

        Args:
            stride: sample every `stride`-th token; None samples no token.
            most: largest number of sampled tokens; None is no limit.
        """
        self._watching, self._watched = True, None
        self._sample_stride, self._most_sampled = stride, most

    def take_statistics(self) -> InputStatistics:
        """Stop gathering, and return the statistics since `watch_inputs`. They are empty if the layer never ran, as happens to experts."""
        watched, self._watching, self._watched = self._watched, False, None
        stored = self.offloaded("weight")
        device = self.weight.device if stored is None else stored.device
        return watched or InputStatistics.none(self.weight.shape[1], device)

    def start_input_step(self, statistics: InputStatistics) -> None:
        """Give the inputs a learned step size, if the scheme has one per tensor."""
        bits = self.scheme.activation_bits
        if bits is not None and self.scheme.activation_strategy == "tensor":
            largest = torch.maximum(-statistics.low.min(), statistics.high.max())
            self.input_step = InputStep(starting_step(statistics.second_moment, largest, bits), bits)

    def freeze(self, weight: QuantizedWeight) -> None:
        """Replace the original weight and the rounding by a finished weight."""
        self.rounding, self._finished = None, replace(weight, codes=weight.codes.to("meta"))
        self.put("weight", weight.codes)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Inputs as the weight of the soft and the hard phase multiplies them; unchanged if the scheme does not quantize inputs."""
        if self.input_step is not None:
            return self.input_step.soft(x) if self.phase is Phase.SOFT else self.input_step.hard(x)
        return x if self.scheme.activation_bits is None else quantize_per_token(x, self.scheme.activation_bits)


def replace_linears(block: nn.Module, schemes: Mapping[str, Scheme], scratch: Scratch) -> dict[str, QuantizedLinear]:
    """Replace each named linear layer of a block by a `QuantizedLinear`, and return the new layers by name."""
    layers = {}
    for name, scheme in schemes.items():
        owner, _, leaf = name.rpartition(".")
        linear = block.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} is a {type(linear).__name__}, not a linear layer")
        layers[name] = QuantizedLinear(linear, scheme, scratch)
        setattr(block.get_submodule(owner), leaf, layers[name])
    return layers
