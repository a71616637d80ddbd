"""Tiny random models of every family, and calibration tokens for them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB = 96
SEQ_LEN = 16

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_LLAMA_LIKE = {**_COMMON, "intermediate_size": 128, "num_key_value_heads": 2, "tie_word_embeddings": False}

FAMILIES: dict[str, dict[str, Any]] = {
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


def make_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of a family in float32, with weights large enough that its blocks do something."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**FAMILIES[family], **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight", "layer_norm.weight")):
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.12)
    return model


def save_model(folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """Save a tiny model as a checkpoint in several shards, and return its folder."""
    shard_size = options.pop("max_shard_size", "60KB")
    make_model(family, **options).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def save_tokens(path: Path, num_tokens: int = 8 * SEQ_LEN, seed: int = 1) -> Path:
    """Write random token ids as .npy and return the path."""
    np.save(path, np.random.default_rng(seed).integers(0, VOCAB, num_tokens))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of all files below a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
