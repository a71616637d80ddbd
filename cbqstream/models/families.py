"""What has to be said of a model family that its code in transformers does not say: a row, or nothing at all.

What a block computes, its attention mask, rotary embedding and keyword arguments, the norm and the head at the end: all of that is the
family's own code in transformers, run as it is. The list of blocks and the layers in them are found. A row adds where channels can be
rescaled. A family without a row runs too, and is said to be untested.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Fold:
    """A place in a block where channels can be rescaled: what writes them is divided by a scale, what reads them multiplied.

    In names `*` stands for any number, the same in all of them.
    """

    writer: str
    """A norm, or a linear layer between which and its readers every channel passes on its own, homogeneously."""
    readers: tuple[str, ...]
    """Linear layers; together they are all that reads the channels."""
    only_if: tuple[str, Any] | None = None
    """A setting of config.json and the value with which this holds."""

    def holds(self, config: Any) -> bool:
        """Whether it does under a configuration."""
        return self.only_if is None or bool(getattr(config, self.only_if[0], None) == self.only_if[1])

    def in_block(self, modules: Collection[str]) -> "list[Fold]":
        """This fold at every place of a block with those modules that has all of its parts."""
        pattern = re.compile(re.escape(self.writer).replace(r"\*", r"(\d+)"))
        found = []
        for name in modules:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            number = match[1] if match.groups() else ""
            readers = tuple(reader.replace("*", number) for reader in self.readers)
            if all(reader in modules for reader in readers):
                found.append(Fold(name, readers))
        return found


_Q_K_V = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_INTO_ATTENTION = Fold("input_layernorm", _Q_K_V)
_VALUES = Fold("self_attn.v_proj", ("self_attn.o_proj",))
_INTO_MLP = Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
_GATED = Fold("mlp.up_proj", ("mlp.down_proj",))
_EXPERTS = Fold("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",))
_LLAMA = (_INTO_ATTENTION, _VALUES, _INTO_MLP, _GATED)
_NORMS_AFTER = (_VALUES, _GATED)  # or norms that scale by 1 + weight, which no fold keeps exact
_GLM = (_INTO_ATTENTION, _VALUES, Fold("post_attention_layernorm", ("mlp.gate_up_proj",)))
_PARALLEL = Fold("input_layernorm", (*_Q_K_V, "mlp.gate_proj", "mlp.up_proj"))
_FUSED_HEADS = "self_attention.query_key_value"
_PRE_NORM = ("do_layer_norm_before", True)  # else the residual sum reads the norms too
_OPT = (
    Fold("self_attn_layer_norm", _Q_K_V, _PRE_NORM),
    Fold("self_attn.v_proj", ("self_attn.out_proj",)),
    Fold("final_layer_norm", ("fc1",), _PRE_NORM),
    Fold("fc1", ("fc2",), ("activation_function", "relu")),  # ReLU(x / s) = ReLU(x) / s
)
_BLOOM = (
    Fold("input_layernorm", (_FUSED_HEADS,), ("apply_residual_connection_post_layernorm", False)),
    Fold("post_attention_layernorm", ("mlp.dense_h_to_4h",), ("apply_residual_connection_post_layernorm", False)),
)
_FALCON = (
    Fold("ln_attn", (_FUSED_HEADS,)),
    Fold("ln_mlp", ("mlp.dense_h_to_4h",)),
    Fold("input_layernorm", (_FUSED_HEADS, "mlp.dense_h_to_4h"), ("parallel_attn", True)),
    Fold("input_layernorm", (_FUSED_HEADS,), ("parallel_attn", False)),
    Fold("post_attention_layernorm", ("mlp.dense_h_to_4h",), ("parallel_attn", False)),
)
_NEOX = (
    Fold("input_layernorm", ("attention.query_key_value",)),
    Fold("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
)
_PHI = (Fold("input_layernorm", (*_Q_K_V, "mlp.fc1")), Fold("self_attn.v_proj", ("self_attn.dense",)))  # GELU
_PHI3 = (
    Fold("input_layernorm", ("self_attn.qkv_proj",)),
    Fold("post_attention_layernorm", ("mlp.gate_up_proj",)),
)
_STABLELM = (
    Fold("input_layernorm", _Q_K_V, ("use_parallel_residual", False)),
    Fold("input_layernorm", (*_Q_K_V, "mlp.gate_proj", "mlp.up_proj"), ("use_parallel_residual", True)),
    _VALUES,
    _INTO_MLP,
    _GATED,
)
_OLMO = (Fold("self_attn.v_proj", ("self_attn.o_proj",), ("clip_qkv", None)), _GATED)
_STARCODER2 = (_INTO_ATTENTION, _VALUES, Fold("post_attention_layernorm", ("mlp.c_fc",)))
# the router reads the norm before the experts too, so that one is left as it is
_QWEN_MOE = (
    _INTO_ATTENTION,
    _VALUES,
    _INTO_MLP,
    _GATED,
    _EXPERTS,
    Fold("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",)),
)
_MIXTRAL = (_INTO_ATTENTION, _VALUES, _EXPERTS)
_LATENT_KEYS = "self_attn.kv_a_proj_with_mqa"
_DEEPSEEK = (
    Fold("input_layernorm", ("self_attn.q_a_proj", _LATENT_KEYS)),
    Fold("input_layernorm", ("self_attn.q_proj", _LATENT_KEYS)),  # without a rank for queries
    Fold("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
    Fold("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
    _INTO_MLP,
    _GATED,
    _EXPERTS,
    Fold("mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",)),
)

FAMILIES: Mapping[str, tuple[Fold, ...]] = MappingProxyType(
    {
        "bloom": _BLOOM,
        "cohere": (_PARALLEL, _VALUES, _GATED),
        "cohere2": (_PARALLEL, _VALUES, _GATED),
        "deepseek_v2": _DEEPSEEK,
        "deepseek_v3": _DEEPSEEK,
        "falcon": _FALCON,
        "gemma": _NORMS_AFTER,
        "gemma2": _NORMS_AFTER,
        "gemma3": _NORMS_AFTER,
        "gemma3_text": _NORMS_AFTER,
        "glm": _GLM,
        "glm4": _GLM,
        "gpt_neox": _NEOX,
        "granite": _LLAMA,
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "mixtral": _MIXTRAL,
        "olmo": _OLMO,
        "olmo2": _NORMS_AFTER,
        "olmo3": _NORMS_AFTER,
        "opt": _OPT,
        "phi": _PHI,
        "phi3": _PHI3,
        "qwen2": _LLAMA,
        "qwen2_5_vl": _LLAMA,
        "qwen2_moe": _QWEN_MOE,
        "qwen3": _LLAMA,
        "qwen3_moe": _QWEN_MOE,
        "smollm3": _LLAMA,
        "stablelm": _STABLELM,
        "starcoder2": _STARCODER2,
    }
)
"""By `model_type` of config.json: those that the tests run."""

EXPERT = re.compile(r"\.experts\.(\d+)\.")
"""In the path of a layer, the number of the expert that it belongs to."""

JOINED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
        "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    }
)
"""Layers of a block that inference engines compute as one, by the name that vLLM has for the one."""


def folds_of(model_type: str, config: Any, modules: Collection[str]) -> tuple[Fold, ...]:
    """The folds of a block with those modules that hold under a configuration."""
    holding = [fold for fold in FAMILIES.get(model_type, ()) if fold.holds(config)]
    return tuple(found for fold in holding for found in fold.in_block(modules))


def joined_with(layer: str) -> str:
    """A name for the layers of a block that inference engines compute as one with this layer, and so need one scheme."""
    expert = EXPERT.search(layer)
    if expert is not None:
        return f"{layer[: expert.start()]}.experts"
    owner, _, leaf = layer.rpartition(".")
    return next((f"{owner}.{leaves[0]}" for leaves in JOINED.values() if leaf in leaves), layer)
