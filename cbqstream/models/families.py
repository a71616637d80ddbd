"""The model families that are supported: a row is all that a decoder-only family needs.

What a block computes, its attention mask, rotary embedding and keyword arguments, the norm and the head at the end: all of that is the
family's own code in transformers, run as it is.
"""

from collections.abc import Mapping
from types import MappingProxyType

BLOCKS: Mapping[str, str] = MappingProxyType(
    {
        "llama": "model.layers",
        "mistral": "model.layers",
        "opt": "model.decoder.layers",
        "qwen2": "model.layers",
        "qwen3": "model.layers",
    }
)
"""Module path of the list of transformer blocks, by `model_type` of config.json."""
