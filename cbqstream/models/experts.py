"""Experts as separate linear layers, which is how most checkpoints and inference engines store them.

transformers 5 stores the experts of a block fused, as tensors with a dimension for the expert. Here each expert is a module of its own, so
a layer of an expert is quantized, stored and named like any other layer.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cbqstream.models.families import EXPERT, ExpertLayout, joined_with
from cbqstream.runtime.memory import trim_heap


class _EmptyLinear(nn.Linear):
    """A linear layer whose parameters are on the meta device and are not initialized, which would take most of the time."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias, device="meta")

    def reset_parameters(self) -> None:
        """Do nothing, because the parameters have no values."""


@dataclass(frozen=True, slots=True)
class FusedPart:
    """Place of a weight or bias of an expert in a fused tensor of transformers."""

    tensor: str
    """Name of the fused tensor in the module of the experts; its first dimension is the expert."""
    transposed: bool
    """Whether the fused tensor holds a weight as [in, out]."""
    half: int | None
    """Half of the outputs that is taken: 0 or 1; None takes all."""
    interleaved: bool
    """Whether the outputs of the two halves alternate."""

    @property
    def is_rows(self) -> bool:
        """Whether the values are consecutive rows of those of the expert."""
        return not (self.transposed or (self.interleaved and self.half is not None))

    def take(self, values: Tensor) -> Tensor:
        """The weight [out, in], or the bias [out], from the values of one expert in the fused tensor."""
        values = values.T if self.transposed else values
        if self.half is not None:
            values = values[self.half :: 2] if self.interleaved else values.chunk(2)[self.half]
        return values.contiguous()

    def fuse(self, values: Mapping[int | None, Tensor]) -> Tensor:
        """The fused tensor of all experts, the inverse of `take`.

        Args:
            values: weights [E, out, in] or biases [E, out] of E experts, by `half` of their parts.
        """
        if self.half is None:
            fused = values[None]
        elif self.interleaved:
            fused = torch.stack([values[0], values[1]], dim=2).flatten(1, 2)
        else:
            fused = torch.cat([values[0], values[1]], dim=1)
        return (fused.transpose(1, 2) if self.transposed else fused).contiguous()


class Expert(nn.Module):
    """A feed-forward network on hidden states [T, D], without weights after construction.

    Args:
        sizes: D and the number of its inner channels.
        activate: function of the inner channels. With a gate, it gets gate and up together, [T, 2 inner]; the result is [T, inner].
        gated: whether the network has a gate.
        biased: whether its layers have biases.
        interleaved: whether the channels of gate and up alternate in the input of `activate`.
    """

    def __init__(
        self,
        sizes: tuple[int, int],
        activate: Callable[[Tensor], Tensor],
        *,
        gated: bool,
        biased: bool,
        interleaved: bool,
    ) -> None:
        super().__init__()
        hidden, inner = sizes
        if gated:
            self.gate_proj = _EmptyLinear(hidden, inner, bias=biased)
        self.up_proj = _EmptyLinear(hidden, inner, bias=biased)
        self.down_proj = _EmptyLinear(inner, hidden, bias=biased)
        self._activate, self._gated, self._interleaved = activate, gated, interleaved

    def forward(self, x_TD: Tensor) -> Tensor:
        """The output [T, D] for hidden states [T, D]."""
        inner = self.up_proj(x_TD)
        if self._gated:
            gate = self.gate_proj(x_TD)
            inner = (
                torch.stack([gate, inner], dim=-1).flatten(-2) if self._interleaved else torch.cat([gate, inner], -1)
            )
        output: Tensor = self.down_proj(self._activate(inner))
        return output


class Experts(nn.Module):
    """The experts of a block, which replace the module that stores them fused in transformers.

    Args:
        experts: the experts, in order. They are the children `0`, `1`, ... of this module.
        fused: place of each parameter of an expert in the fused tensors, by its name in the expert.
        norm: norm of the outputs of the experts before they are weighted; None if there is none.
        identity: whether a choice behind the last expert gives the input unchanged. Otherwise, it gives nothing.
    """

    see_all = False
    """Whether every expert computes every token, so that its statistics include all tokens. The output does not change."""
    instead: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """Function that gives the weighted sum [T, D] in place of the experts, from the arguments of `forward`; None computes with them."""

    def __init__(
        self,
        experts: Iterator[Expert],
        fused: Mapping[str, FusedPart],
        *,
        norm: nn.Module | None = None,
        identity: bool = False,
    ) -> None:
        super().__init__()
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)
        self.number = len(self._modules)
        if norm is not None:
            self.post_expert_norm = norm
        self.fused = fused
        self.any_tensor = next(iter(fused.values())).tensor
        self.identity = identity

    def __len__(self) -> int:
        return self.number

    @property
    def norm(self) -> nn.Module | None:
        """Norm of the outputs of the experts before they are weighted."""
        return getattr(self, "post_expert_norm", None)

    @property
    def hidden_size(self) -> int:
        """Width D of the inputs and outputs."""
        first = next(iter(self)).get_submodule("up_proj")
        return int(first.in_features)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[nn.Module]:
        return (self.get_submodule(str(number)) for number in range(self.number))

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum [T, D] of the outputs of the experts of each token, added in the order of the experts.

        Args:
            x_TD: hidden states, or [1, T, D] of one segment.
            chosen_TK: indices of the K experts that the router chose for each token.
            weights_TK: weights of their outputs.
        """
        shape, x_TD = x_TD.shape, x_TD.reshape(-1, x_TD.shape[-1])
        if self.instead is not None:
            return self.instead(x_TD, chosen_TK, weights_TK).reshape(shape)
        if x_TD.device.type == "cpu":
            trim_heap()  # varying batch sizes of experts fragment glibc's heap by hundreds of megabytes in every pass
        total_TD = torch.zeros_like(x_TD)
        numbers, by_expert = chosen_TK.flatten().sort(stable=True)
        behind = torch.arange(1, self.number + 1, dtype=numbers.dtype, device=numbers.device)
        # the only synchronization with the device
        parts = torch.tensor_split(by_expert, torch.searchsorted(numbers, behind).tolist())
        for expert, chosen in zip(self, parts[: self.number], strict=True):
            tokens, choices = chosen // chosen_TK.shape[1], chosen % chosen_TK.shape[1]
            if self.see_all or len(tokens):
                y = self.output(expert, x_TD)[tokens] if self.see_all else self.output(expert, x_TD[tokens])
                total_TD.index_add_(0, tokens, (y * weights_TK[tokens, choices, None]).to(total_TD.dtype))
        for chosen in parts[self.number :] if self.identity else ():
            tokens, choices = chosen // chosen_TK.shape[1], chosen % chosen_TK.shape[1]
            total_TD.index_add_(0, tokens, (x_TD[tokens] * weights_TK[tokens, choices, None]).to(total_TD.dtype))
        return total_TD.reshape(shape)

    def output(self, expert: nn.Module, x_TD: Tensor) -> Tensor:
        """Output [T, D] of one expert, before it is weighted."""
        y: Tensor = expert(x_TD)
        return y if self.norm is None else self.norm(y)


class SortedExperts(Experts):
    """Experts that get the tokens in order of the experts, scaled by the weights of the router and zero where they were not chosen."""

    def forward(self, x_ND: Tensor) -> Tensor:  # type: ignore[override]
        """The outputs [E T, D] of E experts for T tokens each, [E T, D]. An expert without biases gives zero for zero."""
        x_ETD = x_ND.view(self.number, -1, x_ND.shape[-1])
        chosen_ET = (x_ETD != 0).any(dim=-1)
        _, token_of = chosen_ET.nonzero(as_tuple=True)
        total_ETD = torch.zeros_like(x_ETD)
        parts = torch.split(token_of, chosen_ET.sum(1).tolist())
        for number, (expert, tokens) in enumerate(zip(self, parts, strict=True)):
            if len(tokens):
                total_ETD[number] = total_ETD[number].index_copy(0, tokens, expert(x_ETD[number, tokens]))
        return total_ETD.reshape(x_ND.shape)


def separate_experts(block: nn.Module, layout: ExpertLayout) -> None:
    """Replace every fused module of experts in a block by `Experts` without weights, in place.

    Args:
        block: the block, on the meta device.
        layout: facts about the fused experts that their module does not state.

    Raises:
        ValueError: the experts have a form that is not supported.
    """
    for name, module in list(block.named_modules()):
        if not _is_fused(module):
            continue
        gated = isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
        biased = bool(getattr(module, "has_bias", False))
        transposed = bool(getattr(module, "is_transposed", layout.transposed))
        interleaved = not getattr(module, "is_concatenated", True)
        activate = _activation_of(module, layout, gated=gated)
        number, *shape = module.down_proj.shape
        sizes = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
        fused = _fused_parts(gated=gated, biased=biased, transposed=transposed, interleaved=interleaved)
        for part in {part.tensor for part in fused.values()}:
            delattr(module, part)  # the module itself stays alive for its activation
        made = (
            Expert(sizes, activate, gated=gated, biased=biased, interleaved=interleaved) for _ in range(int(number))
        )
        norm = getattr(module, "post_expert_norm", None) if getattr(module, "has_post_expert_norm", False) else None
        kind = SortedExperts if layout.sorted_inputs else Experts
        owner, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(owner), leaf, kind(made, fused, norm=norm, identity=layout.identity))


def _is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of experts in tensors with a dimension for the expert."""
    parts = {name: value.dim() for name, value in module.named_parameters(recurse=False)}
    gated, plain = "gate_up_proj" in parts, "up_proj" in parts and not getattr(module, "has_gate", True)
    return parts.get("down_proj") == 3 and (gated or plain)


def _activation_of(module: Any, layout: ExpertLayout, *, gated: bool) -> Callable[[Tensor], Tensor]:
    """Function of the inner channels of an expert.

    Raises:
        ValueError: the module does not have it as a function of its own.
    """
    if gated and hasattr(module, "_apply_gate"):
        gate: Callable[[Tensor], Tensor] = module._apply_gate
        return gate
    function = getattr(module, "act_fn", None)
    if function is None or (gated and not layout.plain_gate):
        raise ValueError(
            f"the experts of {type(module).__name__} have a form that is not supported"
            " (their activation is not a function of its own)"
        )
    return (lambda both: function(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1]) if gated else function


def _fused_parts(*, gated: bool, biased: bool, transposed: bool, interleaved: bool) -> dict[str, FusedPart]:
    """Place of each parameter of an expert in the fused tensors, by its name in the expert."""
    places = {"down_proj": ("down_proj", None)} | (
        {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)} if gated else {"up_proj": ("up_proj", None)}
    )
    weights = {
        f"{layer}.weight": FusedPart(tensor, transposed, half, interleaved) for layer, (tensor, half) in places.items()
    }
    biases = {
        f"{layer}.bias": FusedPart(f"{tensor}_bias", transposed=False, half=half, interleaved=interleaved)
        for layer, (tensor, half) in places.items()
    }
    return weights | (biases if biased else {})


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
