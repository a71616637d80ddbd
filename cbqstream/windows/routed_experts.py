"""Routed experts of a block that are read one at a time, because they do not fit in memory together.

A stream moves through such a block in three steps. The block runs on all segments while its experts only record their inputs (`route`).
Each expert is read once and computes the tokens that the router sent to it (`add_experts`). The block runs again and gets the sums.
The layers outside the experts are few, so running them twice costs little.

Shapes: N segments, S tokens in a segment, T = N S tokens, K experts of a token, D hidden dimension.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cbqstream.activations.token_store import TokenStore
from cbqstream.checkpoint.tensors import WeightSource
from cbqstream.models.block import build_expert
from cbqstream.models.experts import Experts
from cbqstream.records import BlockSpec, Compute
from cbqstream.runtime.memory import trim_heap

TOKENS_AT_ONCE = 2048
"""Number of tokens that an expert computes at once."""


@dataclass(frozen=True, slots=True)
class Routed:
    """Inputs of the experts of a block for all tokens, and the choices of its router."""

    x: TokenStore
    """Inputs of the experts."""
    chosen: list[Tensor] = field(default_factory=list)
    """Experts of the tokens of each batch of segments, int32 [B S, K] on the CPU."""
    weights: list[Tensor] = field(default_factory=list)
    """Weights of their outputs, float32 [B S, K] on the CPU."""

    @property
    def choices(self) -> int:
        """Number of choices of the router, T K."""
        return sum(chosen_TK.numel() for chosen_TK in self.chosen)

    def by_expert(self, number: int) -> list[tuple[Tensor, Tensor]]:
        """For each of `number` experts, and for choices behind the last one: its tokens, ascending int64, and the weights, float32.

        A token that chose an expert twice is in the list once, with the sum of the weights.
        """
        chosen_TK, weights_TK = torch.cat(self.chosen).long(), torch.cat(self.weights)
        found = []
        order = chosen_TK.flatten().argsort(stable=True)
        counts = chosen_TK.flatten().bincount(minlength=number).tolist()
        for places in torch.split(order, counts):
            tokens, inverse = torch.unique(places // chosen_TK.shape[1], return_inverse=True)
            weights = weights_TK.flatten()[places]
            found.append((tokens, torch.zeros(len(tokens)).index_add_(0, inverse, weights)))
        return found


class RoutedExperts:
    """The routed experts of a block, without their weights.

    Args:
        spec: names of the parts of the block.
        name: name of the module of the experts in the block.
        module: the module; the linear layers in it have no weights.
    """

    def __init__(self, spec: BlockSpec, name: str, module: Experts) -> None:
        self.name, self.module = name, module
        self.prefix = f"{spec.prefix}.{name}"
        """Module path of the experts."""
        self.key = f"experts.{spec.index}"
        """Key of the sums of their outputs among the values beside a stream."""
        self._names = {layer: spec.tensors[f"{layer}.weight"] for layer in expert_layers(spec, name)}

    def __len__(self) -> int:
        return len(self.module)

    @property
    def hidden_size(self) -> int:
        """Width of their inputs and outputs, D."""
        return self.module.hidden_size

    def layers(self, number: int) -> dict[str, str]:
        """Name in the checkpoint of each weight of an expert, by the name of its layer in the expert."""
        prefix = f"{self.name}.{number}."
        return {name.removeprefix(prefix): stored for name, stored in self._names.items() if name.startswith(prefix)}

    def read(
        self, number: int, source: WeightSource, device: torch.device, dtypes: Mapping[str, torch.dtype | None]
    ) -> nn.Module:
        """One expert with its weights. See `build_expert`."""
        expert = self.module.get_submodule(str(number))
        return build_expert(expert, self.layers(number), source, device=device, dtypes=dtypes)

    def give(self, sums_BSD: Tensor) -> None:
        """Give these sums of the outputs of the experts in the next run of the block."""
        left = sums_BSD.flatten(0, 1)

        def take(x_TD: Tensor, _chosen: Tensor, _weights: Tensor) -> Tensor:
            nonlocal left
            given, left = left[: len(x_TD)], left[len(x_TD) :]
            return given.to(x_TD.dtype)

        self.module.instead = take

    def record(self, chosen: list[Tensor], weights: list[Tensor], inputs: list[Tensor]) -> None:
        """Add the arguments of the experts to lists in the next runs of the block, and give zeros."""

        def take(x_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
            inputs.append(x_TD)
            chosen.append(chosen_TK.to("cpu", torch.int32))
            weights.append(weights_TK.float().cpu())
            return torch.zeros_like(x_TD)

        self.module.instead = take


def expert_layers(spec: BlockSpec, name: str) -> list[str]:
    """Linear layers of the routed experts of a block, by their name in the block.

    Args:
        spec: names of the parts of the block.
        name: name of the module of the experts.
    """
    return [layer for layer in spec.linears if layer.startswith(f"{name}.") and layer[len(name) + 1].isdigit()]


@torch.no_grad()
def add_experts(
    experts: RoutedExperts,
    routed: Routed,
    source: WeightSource,
    compute: Compute,
    sums: TokenStore,
    share: float = 1.0,
) -> None:
    """Add the weighted outputs of all experts to `sums`, one expert after the other.

    Args:
        experts: the experts.
        routed: their inputs.
        source: source of their weights, each of which is read once.
        compute: device and dtype.
        sums: the sums of all tokens.
        share: factor of all outputs.

    Raises:
        InputError: a weight cannot be read.
    """
    parts = [(tokens, weights * share) for tokens, weights in routed.by_expert(len(experts))]
    for number, (tokens, weights) in enumerate(parts[: len(experts)]):
        if not len(tokens):
            continue
        trim_heap()  # experts have varying numbers of tokens, which fragments the heap
        dtypes = dict.fromkeys(experts.layers(number), compute.dtype)
        expert = experts.read(number, source, compute.device, dtypes)
        for some, gates in in_parts(tokens, weights):
            y_TD = experts.module.output(expert, routed.x.take(some).to(compute.device, compute.dtype))
            sums.add(some, y_TD.float().cpu() * gates.unsqueeze(1))
    for tokens, weights in parts[len(experts) :] if experts.module.identity else ():
        for some, gates in in_parts(tokens, weights):
            sums.add(some, routed.x.take(some).float() * gates.unsqueeze(1))


def in_parts(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding parts of tensors with one row for each token, `TOKENS_AT_ONCE` tokens at a time."""
    yield from zip(*(torch.split(value, TOKENS_AT_ONCE) for value in values), strict=True)
