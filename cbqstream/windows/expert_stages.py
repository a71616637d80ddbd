"""Inputs of the layers of an expert that is reconstructed alone, for codes in closed form."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cbqstream.activations.token_store import TokenStore
from cbqstream.records import Compute
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.resident_block import ResidentBlock, run_blocks
from cbqstream.windows.routed_experts import in_parts
from cbqstream.windows.stage_inputs import SharedInput

_LAST = "down_proj"
PRIOR_TOKENS = 32
"""Number of tokens as which the tokens of all experts of the block count in the sums of each, because an expert may see few."""


@dataclass(frozen=True, slots=True)
class ExpertStages:
    """Inputs of the layers of an expert in both streams, times the weights of the router. See `StageInputs`.

    The layers that read the input of the expert are the first stage, and the one that reads its inner channels is the second.
    """

    block: ResidentBlock
    """The expert."""
    reference: TokenStore
    """Inputs of all tokens on the reference stream."""
    quantized: TokenStore
    """Inputs of all tokens on the quantized stream."""
    tokens: Tensor
    """Numbers of the tokens of the expert, int64 [T], ascending."""
    gates: Tensor
    """Weights of the router for them, float32 [T]."""
    firsts: Sequence[int]
    """Position of the first token of each segment, and the number of all tokens."""
    sample: Tensor
    """Numbers of a sample of all tokens of the block, int64, ascending."""
    compute: Compute

    def stages(self) -> list[list[SharedInput]]:
        """The stages of the expert, in the order in which they are called; those without quantized layers are left out."""
        outer = tuple(name for name in self.block.layers if name != _LAST)
        inner = tuple(name for name in self.block.layers if name == _LAST)
        return [[SharedInput(layers)] for layers in (outer, inner) if layers]

    def read(
        self, stage: Sequence[SharedInput], segments: Sequence[int]
    ) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]:
        """The inputs of a stage by the name of the first layer that reads them, of the tokens of segments and of the sample.

        Args:
            stage: the layers; those of the stage before have their codes.
            segments: numbers of the segments.

        Yields:
            The inputs [T, I] of the same tokens in the reference stream and in the quantized stream.
        """
        (shared,) = stage
        own = torch.cat([torch.arange(self.firsts[segment], self.firsts[segment + 1]) for segment in segments])
        mean = self.gates.square().mean().sqrt() if len(self.gates) else torch.ones(())
        prior = mean * (PRIOR_TOKENS / len(self.sample)) ** 0.5
        for tokens, gates in (
            (self.tokens[own], self.gates[own]),
            (self.sample, prior.expand(len(self.sample))),
        ):
            for some, weights in in_parts(tokens, gates):
                found = [
                    self._input(shared.first, store.take(some), phase) * weights.unsqueeze(1).to(self.compute.device)
                    for store, phase in ((self.reference, Phase.ORIGINAL), (self.quantized, Phase.HARD))
                ]
                yield {shared.first: found[0]}, {shared.first: found[1]}

    def _input(self, layer: str, x_TD: Tensor, phase: Phase) -> Tensor:
        """Input [T, I] of a layer for inputs [T, D] of the expert, float32."""
        x_TD = x_TD.to(self.compute.device, self.compute.dtype)
        if layer != _LAST:
            return x_TD.float()
        seen: list[Tensor] = []
        see: Callable[..., None] = partial(_see, seen)
        handle = self.block.layers[layer].register_forward_pre_hook(see)
        try:
            run_blocks([self.block], x_TD, phase)
        finally:
            handle.remove()
        return seen[0].float()


def _see(seen: list[Tensor], _layer: torch.nn.Module, inputs: tuple[Tensor]) -> None:
    seen.append(inputs[0])
