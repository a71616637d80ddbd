"""Experts as separate linear layers, which is how checkpoints and inference engines store them.

transformers 5 stores the experts of a block fused, as tensors with a dimension for the expert. Here each expert is a module of its own, so
a layer of an expert is quantized, stored and named like any other layer.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from cbqstream.models.families import EXPERT, ExpertLayout, joined_with
from cbqstream.runtime.memory import trim_heap


class _EmptyLinear(nn.Linear):
    """A linear layer without bias whose weight is on the meta device and is not initialized, which would take most of the time."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")

    def reset_parameters(self) -> None:
        """Do nothing, because the weight has no values."""


class Expert(nn.Module):
    """A gated feed-forward network on hidden states [T, D], without weights after construction.

    Args:
        hidden: D, width of the hidden states.
        inner: width of gate and up.
        gate: function that computes the gated product [T, inner] from gate and up together, [T, 2 inner].
    """

    def __init__(self, hidden: int, inner: int, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = _EmptyLinear(hidden, inner)
        self.up_proj = _EmptyLinear(hidden, inner)
        self.down_proj = _EmptyLinear(inner, hidden)
        self._gate = gate

    def forward(self, x_TD: Tensor) -> Tensor:
        """The output [T, D] for hidden states [T, D]."""
        both = torch.cat([self.gate_proj(x_TD), self.up_proj(x_TD)], dim=-1)
        output: Tensor = self.down_proj(self._gate(both))
        return output


class Experts(nn.ModuleList):
    """The experts of a block, which replace the module that stores them fused in transformers."""

    see_all = False
    """Whether every expert computes every token, so that its statistics include all tokens. The output does not change."""

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum [T, D] of the outputs of the experts of each token, added in the order of the experts.

        Args:
            x_TD: hidden states.
            chosen_TK: indices of the K experts that the router chose for each token.
            weights_TK: weights of their outputs.
        """
        if x_TD.device.type == "cpu":
            trim_heap()  # varying batch sizes of experts fragment glibc's heap by hundreds of megabytes in every pass
        total_TD = torch.zeros_like(x_TD)
        by_expert = chosen_TK.flatten().argsort(stable=True)
        # the only synchronization with the device
        counts = chosen_TK.flatten().bincount(minlength=len(self))[: len(self)].tolist()
        for expert, chosen in zip(self, torch.split(by_expert[: sum(counts)], counts), strict=True):
            tokens, choices = chosen // chosen_TK.shape[1], chosen % chosen_TK.shape[1]
            if self.see_all or len(tokens):
                y = expert(x_TD)[tokens] if self.see_all else expert(x_TD[tokens])
                y = y * weights_TK[tokens, choices, None]
                total_TD.index_add_(0, tokens, y.to(total_TD.dtype))
        return total_TD


def separate_experts(block: nn.Module, layout: ExpertLayout) -> None:
    """Replace every fused module of experts in a block by `Experts` without weights, in place.

    Args:
        block: the block, on the meta device.
        layout: layout of the fused experts.

    Raises:
        ValueError: the experts have a form that is not supported.
    """
    for name, module in list(block.named_modules()):
        fused = [getattr(module, part, None) for part in layout.fused]
        if not all(isinstance(value, nn.Parameter) and value.dim() == 3 for value in fused):
            continue
        gate = getattr(module, "_apply_gate", None)
        odd = {key: getattr(module, key, value) for key, value in layout.required.items()}
        found = [f"{key} is {odd[key]}" for key, value in layout.required.items() if odd[key] != value]
        if gate is None or found:
            form = ", ".join(found) or "their gate is not a function of its own"
            raise ValueError(f"the experts of {type(module).__name__} have a form that is not supported ({form})")
        number, double, hidden = module.gate_up_proj.shape
        for part in layout.fused:
            delattr(module, part)  # the module itself stays alive for its method `_apply_gate`
        owner, _, leaf = name.rpartition(".")
        experts = Experts(Expert(hidden, double // 2, gate) for _ in range(number))
        setattr(block.get_submodule(owner), leaf, experts)


def tokens_by_expert(tokens_by_layer: Mapping[str, int]) -> dict[str, list[int]]:
    """Numbers of tokens of the experts of a block, in order, by the name of the module that contains the experts.

    Args:
        tokens_by_layer: number of tokens of every layer of the block, by the name of the layer.
    """
    counts: dict[str, list[int]] = {}
    for name, tokens in tokens_by_layer.items():
        if EXPERT.search(name) and name.endswith(".up_proj"):
            counts.setdefault(joined_with(name), []).append(tokens)
    return counts
