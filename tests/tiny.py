"""Tiny random models of every family, tokenizers, and calibration tokens."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

VOCAB = 96
SEQ_LEN = 16

_TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
    **_TOKENS,
}
_LLAMA_LIKE = {**_COMMON, "intermediate_size": 128, "num_key_value_heads": 2, "tie_word_embeddings": False}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_GEMMA = {**_LLAMA_LIKE, "head_dim": 16, "sliding_window": 8, "layer_types": _ALTERNATING, "tie_word_embeddings": True}
_EXPERTS = {**_LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_IMAGE_TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
}
_MULTIMODAL_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_LATENT_ATTENTION = {
    **_LLAMA_LIKE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}

SOME_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": 8, "head_dim": 16},
    "qwen2": {
        **_LLAMA_LIKE,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    },
    "qwen3": {**_LLAMA_LIKE, "head_dim": 32},
    "opt": {**_COMMON, "ffn_dim": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
}
"""Settings of the families that most tests use. They cover the common kinds of block."""

FAMILIES: dict[str, dict[str, Any]] = {
    **SOME_FAMILIES,
    "bloom": {"hidden_size": 64, "n_layer": 4, "n_head": 4, **_TOKENS},
    "cohere": _LLAMA_LIKE,
    "cohere2": {**_LLAMA_LIKE, "sliding_window": 8, "layer_types": _ALTERNATING},
    "deepseek_v2": {**_LATENT_ATTENTION, "topk_method": "greedy"},
    "deepseek_v3": _LATENT_ATTENTION,
    "falcon": {**_COMMON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": {**_LLAMA_LIKE, "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {**_GEMMA, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_GEMMA, "query_pre_attn_scalar": 16},
    "gemma3": {
        "text_config": {**_GEMMA, "query_pre_attn_scalar": 16},
        "vision_config": _IMAGE_TOWER,
        "mm_tokens_per_image": 4,
    },
    "glm": {**_LLAMA_LIKE, "head_dim": 16},
    "glm4": {**_LLAMA_LIKE, "head_dim": 16},
    "gpt_neox": {**_COMMON, "intermediate_size": 128, "tie_word_embeddings": False},
    "granite": {**_LLAMA_LIKE, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "olmo3": {**_LLAMA_LIKE, "sliding_window": 8, "layer_types": _ALTERNATING},
    "phi": _LLAMA_LIKE,
    "phi3": _LLAMA_LIKE,
    "qwen2_5_vl": {
        "text_config": {**_LLAMA_LIKE, "rope_parameters": _MULTIMODAL_ROPE},
        "vision_config": {
            **_IMAGE_TOWER,
            "out_hidden_size": 64,
            "depth": 2,
            "num_heads": 2,
            "fullatt_block_indexes": [1],
        },
        **{
            f"{name}_token_id": VOCAB - 6 + index
            for index, name in enumerate(("image", "video", "vision_start", "vision_end"))
        },
    },
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16},
    "smollm3": _LLAMA_LIKE,
    "stablelm": _LLAMA_LIKE,
    "starcoder2": _LLAMA_LIKE,
}
"""Settings of every supported family, by its model type."""


def auto_class(config: Any) -> Any:
    """Auto class of transformers for the text-generating model of a configuration."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def make_model(family: str, seed: int = 0, *, like: str | None = None, **overrides: Any) -> PreTrainedModel:
    """A random model in float32, with weights so large that every block changes its input.

    Args:
        family: model type.
        seed: random seed of the weights.
        like: family whose sizes are used, for a family that is not in `FAMILIES`; `family` by default.
        overrides: settings that replace those of the family.
    """
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**FAMILIES[like or family], **overrides})
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight", "layer_norm.weight")):
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.12)
    return model


def save_model(folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """Save a random model of a family as a checkpoint in several shards, and return its folder. Options are those of `make_model`."""
    shard_size = options.pop("max_shard_size", "60KB")
    model = make_model(family, **options).to(dtype)
    with redirect_stderr(io.StringIO()):  # it prints a progress bar, which tests of the output must not capture
        model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def save_tokenizer(folder: Path, text: list[str], *, special_tokens: tuple[str, ...] = ()) -> Tokenizer:
    """Train a byte-level tokenizer with 300 tokens on texts, and save it in the folder of a model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": list(special_tokens), "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, **options))
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def save_tokens(path: Path, num_tokens: int = 8 * SEQ_LEN, seed: int = 1) -> Path:
    """Write random token ids to a .npy file, and return its path."""
    np.save(path, np.random.default_rng(seed).integers(0, VOCAB, num_tokens))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of all files in a folder and its subfolders, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
