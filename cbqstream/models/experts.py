"""Experts as separate linear layers, as checkpoints and inference engines have them.

transformers 5 holds the experts of a block as two tensors with a dimension for the expert. Here each is a module of its own, so that
a layer of an expert is quantized, stored and named like any other.
"""

from collections.abc import Callable, Mapping

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from cbqstream.models.families import EXPERT, joined_with
from cbqstream.runtime.memory import trim_heap

_FUSED = ("gate_up_proj", "down_proj")
_LAYOUTS = {
    "is_transposed": False,
    "is_concatenated": True,
    "has_bias": False,
    "has_gate": True,
    "has_post_expert_norm": False,
}


class Expert(nn.Module):
    """A gated feed-forward network on hidden states [T, D]."""

    def __init__(self, hidden: int, inner: int, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        with init_empty_weights():
            self.gate_proj = nn.Linear(hidden, inner, bias=False)
            self.up_proj = nn.Linear(hidden, inner, bias=False)
            self.down_proj = nn.Linear(inner, hidden, bias=False)
        self._gate = gate

    def forward(self, x_TD: Tensor) -> Tensor:
        both = torch.cat([self.gate_proj(x_TD), self.up_proj(x_TD)], dim=-1)
        output: Tensor = self.down_proj(self._gate(both))
        return output


class Experts(nn.ModuleList):
    """The experts of a block; stands in for the module in transformers that holds them fused."""

    see_all = False
    """Whether every expert computes every token, so that statistics of its inputs are of all; the output is the same."""

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum [T, D] of the outputs of the experts that the router chose for each token; added up in their order."""
        if x_TD.device.type == "cpu":
            trim_heap()  # experts see now more and now fewer tokens: every pass through them leaves hundreds of megabytes of holes
        total_TD = torch.zeros_like(x_TD)
        by_expert = chosen_TK.flatten().argsort(stable=True)
        counts = chosen_TK.flatten().bincount(minlength=len(self))[: len(self)].tolist()  # the device is asked once
        for expert, chosen in zip(self, torch.split(by_expert[: sum(counts)], counts), strict=True):
            tokens, places = chosen // chosen_TK.shape[1], chosen % chosen_TK.shape[1]
            if self.see_all or len(tokens):
                y = expert(x_TD)[tokens] if self.see_all else expert(x_TD[tokens])
                y = y * weights_TK[tokens, places, None]
                total_TD.index_add_(0, tokens, y.to(total_TD.dtype))
        return total_TD


def separate_experts(block: nn.Module) -> None:
    """Put `Experts`, without weights, in the place of every fused module of experts in a block.

    Raises:
        ValueError: they are of a form that is not known.
    """
    for name, module in list(block.named_modules()):
        fused = [getattr(module, part, None) for part in _FUSED]
        if not all(isinstance(value, nn.Parameter) and value.dim() == 3 for value in fused):
            continue
        gate = getattr(module, "_apply_gate", None)
        odd = [key for key, value in _LAYOUTS.items() if getattr(module, key, value) != value]
        if gate is None or odd:
            raise ValueError(
                f"the experts of {type(module).__name__} are of a form that is not supported ({', '.join(odd)})"
            )
        number, double, hidden = module.gate_up_proj.shape
        for part in _FUSED:
            delattr(module, part)  # what is left of it is how it joins gate and up
        owner, _, leaf = name.rpartition(".")
        setattr(
            block.get_submodule(owner),
            leaf,
            Experts(Expert(hidden, double // 2, gate) for _ in range(number)),
        )


def tokens_by_expert(tokens_by_layer: Mapping[str, int]) -> dict[str, list[int]]:
    """Tokens of each expert in order, by the path of their module; of the tokens of all layers of a block, by name."""
    counts: dict[str, list[int]] = {}
    for name, tokens in tokens_by_layer.items():
        if EXPERT.search(name) and name.endswith(".up_proj"):
            counts.setdefault(joined_with(name), []).append(tokens)
    return counts
