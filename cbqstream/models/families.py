"""Model families: one record for each, with the facts that its code in transformers does not contain.

Blocks, attention masks, rotary embeddings, keyword arguments of blocks, the final norm and the head are the code of transformers, which is
run unchanged. The list of blocks and the layers in them are found automatically. A row of `FAMILIES` adds the smoothing pairs of a family
and the facts that differ from the defaults of `Family`. A family without a row runs with the defaults, and a warning reports that it is
untested.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class SmoothingPair:
    """A smoothed layer of a block and the layers that balance it, between which channels can be rescaled.

    In the names of layers, `*` matches any number, which is the same in all names of a pair.
    """

    smooth_layer: str
    """Name of a norm or linear layer.

    Everything between it and the balance layers acts on each channel alone and is homogeneous: multiplying a channel by a positive
    number multiplies the result by the same number.
    """
    balance_layers: tuple[str, ...]
    """Names of linear layers. No other module reads the channels."""
    only_if: tuple[str, Any] | None = None
    """Name of a setting of config.json, and the value with which the pair is valid; None if the pair is always valid."""

    def holds(self, config: Any) -> bool:
        """Whether the pair is valid for the configuration of a model."""
        return self.only_if is None or bool(getattr(config, self.only_if[0], None) == self.only_if[1])

    def in_block(self, modules: Collection[str]) -> "list[SmoothingPair]":
        """Pairs of a block without `*`, one for each number with which all layers of the pair are in the block.

        Args:
            modules: names of the modules of the block.
        """
        pattern = re.compile(re.escape(self.smooth_layer).replace(r"\*", r"(\d+)"))
        found = []
        for name in modules:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            number = match[1] if match.groups() else ""
            readers = tuple(reader.replace("*", number) for reader in self.balance_layers)
            if all(reader in modules for reader in readers):
                found.append(SmoothingPair(name, readers))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayout:
    """Facts about the fused experts of a family that their module in transformers does not state.

    Modules that use transformers' `use_experts_implementation` state the layout of their tensors themselves.
    """

    transposed: bool = False
    """Whether the fused tensors hold each weight as [in, out]."""
    plain_gate: bool = False
    """Whether the inner channels are `act_fn(gate) * up`, although the module has no function for that."""
    sorted_inputs: bool = False
    """Whether the module gets the tokens in the order of the experts, scaled by the weights of the router."""
    identity: bool = False
    """Whether a choice of the router behind the last expert gives the input unchanged."""


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """Architecture of a family in llama.cpp."""

    name: str
    """Member of `gguf.MODEL_ARCH`."""
    interleaved: bool
    """Whether the rotary embedding of llama.cpp rotates pairs of neighboring channels, and not the two halves of a head.

    The rows of queries and keys are then stored in another order.
    """


VISION_PARTS = ("vision_moe",)
"""Names of parts of a block that compute images only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Facts of a model family."""

    pairs: tuple[SmoothingPair, ...] = ()
    """Smoothing pairs of a block."""
    never_quantized: tuple[str, ...] = (
        *("gate", "router", "router_gate", "shared_expert_gate", "dt_proj", "weights_proj", "altup"),
        *VISION_PARTS,
    )
    """Parts of the names of linear layers that stay in full precision.

    They are routers, layers whose weight state space models or indexers of sparse attention use directly, the tiny layers that mix the
    parallel hidden states of Gemma 3n, and parts of a block that compute images.
    """
    experts: ExpertLayout = ExpertLayout()
    """Facts about the fused experts."""
    arguments_by_segment: tuple[str, ...] = ("alibi",)
    """Keyword arguments of blocks whose first dimension is the number of segments times another number, such as that of heads."""
    eager_attention: bool = False
    """Whether transformers has only eager attention for the family, which stores a matrix [S, S] for every head."""
    gguf: GgufArchitecture | None = None
    """Architecture in llama.cpp; None if the family is not exported to GGUF."""


_Q_K_V = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_INTO_ATTENTION = SmoothingPair("input_layernorm", _Q_K_V)
_VALUES = SmoothingPair("self_attn.v_proj", ("self_attn.o_proj",))
_INTO_MLP = SmoothingPair("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
_GATED = SmoothingPair("mlp.up_proj", ("mlp.down_proj",))
_EXPERTS = SmoothingPair("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",))
_LLAMA = (_INTO_ATTENTION, _VALUES, _INTO_MLP, _GATED)
_NORMS_AFTER = (_VALUES, _GATED)  # also for norms that scale by 1 + weight, in which smoothing is not exact
_GLM = (_INTO_ATTENTION, _VALUES, SmoothingPair("post_attention_layernorm", ("mlp.gate_up_proj",)))
_PARALLEL = SmoothingPair("input_layernorm", (*_Q_K_V, "mlp.gate_proj", "mlp.up_proj"))
_FUSED_HEADS = "self_attention.query_key_value"
_PRE_NORM = ("do_layer_norm_before", True)  # otherwise the residual sum reads the output of the norms too
_OPT = (
    SmoothingPair("self_attn_layer_norm", _Q_K_V, _PRE_NORM),
    SmoothingPair("self_attn.v_proj", ("self_attn.out_proj",)),
    SmoothingPair("final_layer_norm", ("fc1",), _PRE_NORM),
    SmoothingPair("fc1", ("fc2",), ("activation_function", "relu")),  # ReLU(x / s) = ReLU(x) / s
)
_BLOOM = (
    SmoothingPair("input_layernorm", (_FUSED_HEADS,), ("apply_residual_connection_post_layernorm", False)),
    SmoothingPair(
        "post_attention_layernorm", ("mlp.dense_h_to_4h",), ("apply_residual_connection_post_layernorm", False)
    ),
)
_FALCON = (
    SmoothingPair("ln_attn", (_FUSED_HEADS,)),
    SmoothingPair("ln_mlp", ("mlp.dense_h_to_4h",)),
    SmoothingPair("input_layernorm", (_FUSED_HEADS, "mlp.dense_h_to_4h"), ("parallel_attn", True)),
    SmoothingPair("input_layernorm", (_FUSED_HEADS,), ("parallel_attn", False)),
    SmoothingPair("post_attention_layernorm", ("mlp.dense_h_to_4h",), ("parallel_attn", False)),
)
_NEOX = (
    SmoothingPair("input_layernorm", ("attention.query_key_value",)),
    SmoothingPair("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
)
# without fc1 and fc2, because GELU between them is not homogeneous
_PHI = (
    SmoothingPair("input_layernorm", (*_Q_K_V, "mlp.fc1")),
    SmoothingPair("self_attn.v_proj", ("self_attn.dense",)),
)
_PHI3 = (
    SmoothingPair("input_layernorm", ("self_attn.qkv_proj",)),
    SmoothingPair("post_attention_layernorm", ("mlp.gate_up_proj",)),
)
_STABLELM = (
    SmoothingPair("input_layernorm", _Q_K_V, ("use_parallel_residual", False)),
    SmoothingPair("input_layernorm", (*_Q_K_V, "mlp.gate_proj", "mlp.up_proj"), ("use_parallel_residual", True)),
    _VALUES,
    _INTO_MLP,
    _GATED,
)
_OLMO = (SmoothingPair("self_attn.v_proj", ("self_attn.o_proj",), ("clip_qkv", None)), _GATED)
_STARCODER2 = (_INTO_ATTENTION, _VALUES, SmoothingPair("post_attention_layernorm", ("mlp.c_fc",)))
# the norm before the experts is not smoothed, because the router reads it too
_QWEN_MOE = (
    _INTO_ATTENTION,
    _VALUES,
    _INTO_MLP,
    _GATED,
    _EXPERTS,
    SmoothingPair("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",)),
)
_MIXTRAL = (_INTO_ATTENTION, _VALUES, _EXPERTS)
_LATENT_KEYS = "self_attn.kv_a_proj_with_mqa"
_DEEPSEEK = (
    SmoothingPair("input_layernorm", ("self_attn.q_a_proj", _LATENT_KEYS)),
    SmoothingPair("input_layernorm", ("self_attn.q_proj", _LATENT_KEYS)),  # models without low-rank queries
    SmoothingPair("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
    SmoothingPair("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
    _INTO_MLP,
    _GATED,
    _EXPERTS,
    SmoothingPair("mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",)),
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bloom": Family(pairs=_BLOOM, eager_attention=True),
        "cohere": Family(pairs=(_PARALLEL, _VALUES, _GATED)),
        "cohere2": Family(pairs=(_PARALLEL, _VALUES, _GATED)),
        "deepseek_v2": Family(pairs=_DEEPSEEK),
        "deepseek_v3": Family(pairs=_DEEPSEEK),
        "falcon": Family(pairs=_FALCON),
        "gemma": Family(pairs=_NORMS_AFTER),
        "gemma2": Family(pairs=_NORMS_AFTER, eager_attention=True),
        "gemma3": Family(pairs=_NORMS_AFTER),
        "gemma3_text": Family(pairs=_NORMS_AFTER),
        "glm": Family(pairs=_GLM),
        "glm4": Family(pairs=_GLM),
        "gpt_neox": Family(pairs=_NEOX),
        "granite": Family(pairs=_LLAMA),
        "llama": Family(pairs=_LLAMA, gguf=GgufArchitecture("LLAMA", interleaved=True)),
        "mistral": Family(pairs=_LLAMA, gguf=GgufArchitecture("LLAMA", interleaved=True)),
        "mixtral": Family(pairs=_MIXTRAL),
        "olmo": Family(pairs=_OLMO),
        "olmo2": Family(pairs=_NORMS_AFTER),
        "olmo3": Family(pairs=_NORMS_AFTER),
        "opt": Family(pairs=_OPT),
        "phi": Family(pairs=_PHI),
        "phi3": Family(pairs=_PHI3),
        "qwen2": Family(pairs=_LLAMA, gguf=GgufArchitecture("QWEN2", interleaved=False)),
        "qwen2_5_vl": Family(pairs=_LLAMA),
        "qwen2_moe": Family(pairs=_QWEN_MOE),
        "qwen3": Family(pairs=_LLAMA, gguf=GgufArchitecture("QWEN3", interleaved=False)),
        "qwen3_moe": Family(pairs=_QWEN_MOE),
        "smollm3": Family(pairs=_LLAMA),
        "stablelm": Family(pairs=_STABLELM),
        "starcoder2": Family(pairs=_STARCODER2),
    }
)
"""Families that are tested, by `model_type` of config.json."""

UNTESTED = Family()
"""Facts that are assumed for a family without a row."""

_SORTED = ExpertLayout(transposed=True, plain_gate=True, sorted_inputs=True)
_EXPERT_LAYOUTS: Mapping[str, ExpertLayout] = MappingProxyType(
    {
        "llama4": _SORTED,
        "llama4_text": _SORTED,
        "longcat_flash": ExpertLayout(plain_gate=True, identity=True),
    }
)
"""Layouts of the experts of families without a row."""

EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")
"""Matches the number of the expert in the path of an expert's layer."""

JOINED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
        "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    }
)
"""Layers that inference engines compute as one layer, by the name of that layer in vLLM."""


def family_of(model_type: str) -> Family:
    """Facts of the family with a `model_type` of config.json."""
    untested = replace(UNTESTED, experts=_EXPERT_LAYOUTS.get(model_type, UNTESTED.experts))
    return FAMILIES.get(model_type, untested)


def smoothing_pairs(family: Family, config: Any, modules: Collection[str]) -> tuple[SmoothingPair, ...]:
    """Smoothing pairs of a block.

    Args:
        family: family of the model.
        config: configuration of the model in transformers, with which some pairs are not valid.
        modules: names of the modules of the block.
    """
    holding = [pair for pair in family.pairs if pair.holds(config)]
    return tuple(found for pair in holding for found in pair.in_block(modules))


def joined_with(layer: str) -> str:
    """Name shared by all layers of a block that inference engines compute as one layer, which must therefore have the same scheme.

    Args:
        layer: name of a layer, in the block or in the checkpoint.
    """
    expert = EXPERT.search(layer)
    if expert is not None:
        return layer[: expert.start(1) - 1]
    owner, _, leaf = layer.rpartition(".")
    return next((f"{owner}.{leaves[0]}" for leaves in JOINED.values() if leaf in leaves), layer)
