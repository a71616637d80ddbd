"""The blocks of a window on the device, with their quantized layers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cbqstream.config import ReconstructionConfig, Scheme
from cbqstream.models.block import BlockArguments, run_block
from cbqstream.numerics.scale_search import minmax_grid, search_grid
from cbqstream.records import QuantizedWeight
from cbqstream.windows.quantized_linear import Phase, QuantizedLinear, replace_linears
from cbqstream.windows.rounding import make_rounding


@dataclass(frozen=True, slots=True)
class ResidentBlock:
    """A block that is in memory: how to run it, and its layers by name."""

    index: int
    module: nn.Module
    arguments: BlockArguments
    layers: Mapping[str, QuantizedLinear]

    @classmethod
    def of(cls, index: int, module: nn.Module, arguments: BlockArguments, linears: tuple[str, ...]) -> "ResidentBlock":
        """Take over a block: its linear layers are replaced."""
        return cls(index, module, arguments, replace_linears(module, linears))

    def watch_inputs(self) -> None:
        """Gather the second moments that `start_rounding` needs."""
        for layer in self.layers.values():
            layer.watch_inputs()

    def start_rounding(
        self, scheme: Scheme, config: ReconstructionConfig, generator: torch.Generator, carried: Mapping[str, Tensor]
    ) -> None:
        """Give every layer its grid and rounding: as an earlier window left them in `carried`, or from the weights and their inputs."""
        for name, layer in self.layers.items():
            state = {
                key.removeprefix(f"{name}."): value for key, value in carried.items() if key.startswith(f"{name}.")
            }
            if state:
                grid = (state["scale0"], state.get("zero_point"))
            else:
                moment = layer.second_moment()
                grid = (
                    search_grid(layer.weight, moment, scheme)
                    if config.init == "search"
                    else minmax_grid(layer.weight, scheme)
                )
            layer.rounding = make_rounding(layer.weight, *grid, scheme, config, generator)
            layer.rounding.load(state)

    def carry(self) -> dict[str, Tensor]:
        """The state of every rounding, for the next window: `layer.name` -> tensor."""
        states = {name: layer.rounding.state() for name, layer in self.layers.items() if layer.rounding is not None}
        return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}

    def harden(self, dtype: torch.dtype) -> dict[str, QuantizedWeight]:
        """The final quantized weights by layer. The block computes with them, in `dtype`, from now on."""
        hard = {name: layer.rounding.harden() for name, layer in self.layers.items() if layer.rounding is not None}
        for name, weight in hard.items():
            self.layers[name].freeze(weight, dtype)
        return hard


def all_layers(blocks: Sequence[ResidentBlock]) -> Iterator[QuantizedLinear]:
    """The layers of all blocks, in order."""
    for block in blocks:
        yield from block.layers.values()


def run_blocks(blocks: Sequence[ResidentBlock], x_BSD: Tensor, phase: Phase) -> Tensor:
    """Hidden states after the blocks, computed with the weights of `phase`."""
    for layer in all_layers(blocks):
        layer.phase = phase
    for block in blocks:
        x_BSD = run_block(block.module, x_BSD, block.arguments)
    return x_BSD
