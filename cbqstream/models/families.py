"""The model families that are supported: a row is all that a decoder-only family needs.

What a block computes, its attention mask, rotary embedding and keyword arguments, the norm and the head at the end: all of that is the
family's own code in transformers, run as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Fold:
    """A place in a block where channels can be rescaled: what writes them is divided by a scale, what reads them multiplied."""

    writer: str
    """A norm, or a linear layer between which and its readers every channel passes on its own, homogeneously."""
    readers: tuple[str, ...]
    """Linear layers; together they are all that reads the channels."""
    only_if: tuple[str, Any] | None = None
    """A setting of config.json and the value with which this holds."""


@dataclass(frozen=True, slots=True)
class Family:
    """What has to be said of a family."""

    blocks: str
    """Module path of the list of transformer blocks."""
    folds: tuple[Fold, ...]

    def folds_of(self, config: Any) -> tuple[Fold, ...]:
        """The folds that hold under a configuration."""
        return tuple(
            fold for fold in self.folds if fold.only_if is None or getattr(config, fold.only_if[0]) == fold.only_if[1]
        )


_PRE_NORM = ("do_layer_norm_before", True)  # else the residual sum reads the norms too
_LLAMA = Family(
    "model.layers",
    (
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Fold("self_attn.v_proj", ("self_attn.o_proj",)),
        Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Fold("mlp.up_proj", ("mlp.down_proj",)),
    ),
)
_OPT = Family(
    "model.decoder.layers",
    (
        Fold("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), _PRE_NORM),
        Fold("self_attn.v_proj", ("self_attn.out_proj",)),
        Fold("final_layer_norm", ("fc1",), _PRE_NORM),
        Fold("fc1", ("fc2",), ("activation_function", "relu")),  # ReLU(x / s) = ReLU(x) / s
    ),
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {"llama": _LLAMA, "mistral": _LLAMA, "opt": _OPT, "qwen2": _LLAMA, "qwen3": _LLAMA}
)
"""By `model_type` of config.json."""
