"""The configuration of a model in transformers, made from config.json for a known `model_type`, and the class of the model."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from cbqstream.checkpoint.folder import is_size, without_quantization
from cbqstream.errors import InputError, shown

_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")
_OTHER_SIZES = (
    "num_attention_heads",
    "intermediate_size",
    "ffn_dim",
    "head_dim",
    "num_key_value_heads",
    "word_embed_proj_dim",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "kv_lora_rank",
    "q_lora_rank",
)
"""Sizes that not every architecture has. They may be null, and 0 means that the model does not have the part."""
_FLOAT = "__float__"
_NEVER_READ = ("auto_map", "model_type", "transformers_version", "architectures")
"""Keys of config.json that are not passed to the configuration of transformers."""
_A_SIZE = f"It must be a whole number from 1 to {1 << 20:,}"
_ALIASES: Mapping[str, str] = MappingProxyType({"kimi_k2": "deepseek_v3"})
"""Model types of published checkpoints whose architecture transformers has under another name."""


def model_type_of(model: Mapping[str, Any]) -> str:
    """Model type in transformers of a content of config.json."""
    found = str(model.get("model_type"))
    return _ALIASES.get(found, found)


def read_configuration(folder: Path, model: Mapping[str, Any], num_tensors: int) -> Any:
    """The configuration in transformers of a model.

    Args:
        folder: folder of the model, for messages.
        model: content of its config.json.
        num_tensors: number of tensors of the checkpoint.

    Raises:
        InputError: the architecture is unknown, or the configuration is not plausible.
    """
    model_type, path = model_type_of(model), folder / "config.json"
    _refuse_implausible(path, model, model_type, num_tensors)
    kept = {
        key: value
        for key, value in _readable(without_quantization(model)).items()
        if key not in _NEVER_READ
        and not key.startswith("_")
        and "kernel" not in key
        and "attn_implementation" not in key
    }
    try:
        config: Any = CONFIG_MAPPING[model_type](**kept)
        text = config.get_text_config()
    except Exception as error:
        raise InputError(path, f"does not describe a {model_type} model: {shown(str(error))}") from error
    for key in _SIZES:
        if not is_size(getattr(text, key, None)):
            raise InputError(path, f"{key} is {shown(str(getattr(text, key, None)))}. {_A_SIZE}.")
    return config


def class_for(config: Any, model: Mapping[str, Any]) -> Any:
    """Class of transformers for a configuration, which generates text: the one that `architectures` names, or the one for text alone.

    Args:
        config: the configuration.
        model: content of config.json.

    Raises:
        ValueError: transformers has no such class.
    """
    # a multimodal model contains a text model, and only the text model is quantized
    mappings = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    found: list[Any] = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    if not found:
        raise ValueError("transformers has no class for it that generates text")
    named = model.get("architectures") or ()
    return next((each for each in found if each.__name__ in named), found[0])


def _refuse_implausible(path: Path, model: Mapping[str, Any], model_type: str, num_tensors: int) -> None:
    """Check architecture and sizes before modules are built from them.

    Raises:
        InputError: the architecture is unknown, or a size is not plausible.
    """
    if model_type not in CONFIG_MAPPING:
        reason = "needs remote code, which is never run" if model.get("auto_map") else "is not in transformers"
        raise InputError(path, f'architecture "{shown(model_type)}" {reason}. Use another model.')
    model = {**model, **(model.get("text_config") or {})}
    other_names = getattr(CONFIG_MAPPING[model_type], "attribute_map", {})
    sizes = {key: model.get(key, model.get(other_names.get(key, key))) for key in (*_SIZES, *_OTHER_SIZES)}
    for key, value in sizes.items():
        each = value if isinstance(value, list) and value else [value]  # some families have a size for each block
        if value is not None and not all(is_size(one) or (one == 0 and key not in _SIZES) for one in each):
            raise InputError(path, f"{key} is {shown(str(value))}. {_A_SIZE}.")
    if int(sizes["num_hidden_layers"] or 0) > num_tensors:
        raise InputError(
            path,
            f"num_hidden_layers is {sizes['num_hidden_layers']:,}, but the weights have {num_tensors:,} tensors.",
        )


def _readable(value: Any) -> Any:
    """A value of config.json as transformers reads it.

    Objects such as `{"__float__": "Infinity"}`, which transformers writes for floats, become floats; aliases become model types; keys that
    are never read are left out.
    """
    if isinstance(value, dict):
        if value.keys() == {_FLOAT} and value[_FLOAT] in ("Infinity", "-Infinity", "NaN"):
            return float(value[_FLOAT])
        return {
            key: model_type_of(value) if key == "model_type" else _readable(inner)
            for key, inner in value.items()
            if key != "auto_map"
        }
    return [_readable(inner) for inner in value] if isinstance(value, list) else value
