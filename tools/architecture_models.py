"""Tiny random models of every architecture for text generation in transformers, with the logits that transformers computes.

A configuration starts from the defaults of its class. Every size with a known name is replaced, lists with one value per block are
shortened, and token ids are moved into a small vocabulary. `architectures.json` holds the sizes by name, and for single types what the
general way misses. Keys of a type that begin with an underscore are no settings:

    _of      type of which the entry is a variant; the settings of that type apply too
    _start   settings that the class needs to be made at all
    _run     path of the module that is run instead of the whole model
    _fused   experts are stored fused, as transformers holds them in memory
"""

import json
import shutil
import traceback
from pathlib import Path

import numpy as np
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

NEAR = 1e-3
"""Largest difference of logits that are the same, as a share of the largest logit."""

_TABLE = json.loads(Path(__file__).with_name("architectures.json").read_text())
_SIZES = {name: int(size) for size, names in _TABLE["sizes"].items() for name in names}
_ROWS = _TABLE["types"]
_BLOCKS, _TOWER_BLOCKS = 4, 2
_COUNTS = _TABLE["block counts"]
_TEXT_PARTS = ("text_config", "language_config", "llm_config", "decoder_config", "decoder")
_ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_ORDINARY_IDS, _LAST_ID = (3, 400), 511
_SEGMENTS, _LENGTH = 2, 20
_HEAD_DIM, _ROTARY_DIM, _LATENT_HEAD_DIM = 32, 16, 48
_NEVER = 1e30
"""Logits of tokens that a model never predicts are negative numbers below this size."""


class NotBuildableError(Exception):
    """transformers cannot make, run, save or load a tiny model of a type."""


def all_types():
    """Names of all types, and of the variants in the table."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    variants = [name for name, row in _ROWS.items() if "_of" in row]
    return sorted({*variants, *(name for mapping in mappings for name in mapping._model_mapping)})


def make_model(name, folder):
    """Write a tiny model into `source`, token ids into `ids.npy` and reference logits into `reference.npy`, unless they are there.

    Args:
        name: name of a type or variant.
        folder: folder to write.

    Raises:
        NotBuildableError: transformers cannot make, run, save or load the model, or its logits say nothing.
    """
    if (folder / "reference.npy").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(*_ORDINARY_IDS, 256))
    row, step = _row(name), "config"
    try:
        config = tiny_config(name)
        step = "model"
        torch.manual_seed(0)
        model = auto_class(config).from_config(config, dtype=torch.float32).eval()
        _randomize(model)
        step = "forward"
        logits = logits_of(model, name, segments(folder))
        step = "save"
        model.save_pretrained(folder / "source", save_original_format=not row.get("_fused", False))
        step = "load"
        loaded = auto_class(config).from_pretrained(folder / "source", dtype=torch.float32).eval()
        reference = logits_of(loaded, name, segments(folder))
    except Exception as error:
        traceback.print_exc()
        raise NotBuildableError(f"{step}: {type(error).__name__}: {one_line(error)}") from error
    _require_meaning(reference, logits)
    np.save(folder / "reference.npy", reference.numpy())


def tiny_config(name):
    """Configuration of the tiny model of a type or variant."""
    row = _row(name)
    model_type, start = row.get("_of", name), row.get("_start", {})
    settings = start | _shrunk(CONFIG_MAPPING[model_type](**start), _BLOCKS, {})
    for path, value in row.items():
        if not path.startswith("_"):
            _override(settings, path, value)
    return CONFIG_MAPPING[model_type](**settings)


def segments(folder):
    """Segments of token ids, int64 [2, 20]."""
    return torch.from_numpy(np.load(folder / "ids.npy")[: _SEGMENTS * _LENGTH]).reshape(_SEGMENTS, _LENGTH)


def difference(found, expected):
    """Largest difference of logits, as a share of the largest expected one."""
    kept = expected.abs() < _NEVER
    return ((found - expected)[kept].abs().max() / expected[kept].abs().max()).item()


def one_line(error):
    """Message of an error as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def _row(name):
    """Entry of a type or variant in the table, with the settings of the type of a variant."""
    row = _ROWS.get(name, {})
    return _ROWS.get(row.get("_of"), {}) | row


def _shrunk(config, blocks, ids, num_layers=None):
    """Settings that make a configuration tiny.

    Args:
        config: configuration with the default sizes.
        blocks: number of blocks of the tiny model.
        ids: token ids that are in use, by name; new ones are added.
        num_layers: number of blocks of the configuration that contains `config`.
    """
    raw = config.to_dict()
    num_layers = next((raw[name] for name in _COUNTS if isinstance(raw.get(name), int)), num_layers)
    axes = 3 if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()) else 0
    settings = {}
    for name, value in raw.items():
        part = vars(config).get(name)
        if isinstance(part, PreTrainedConfig):
            settings[name] = _shrunk(part, blocks if name in _TEXT_PARTS else _TOWER_BLOCKS, ids, num_layers)
            settings[name] |= {"model_type": part.model_type} if part.model_type else {}
            continue
        if name == "rope_parameters" and value:
            small = _rope(value, _ROTARY_DIM if raw.get("qk_rope_head_dim") else _HEAD_DIM, axes)
        elif isinstance(value, (list, tuple)):
            small = _shortened(name, value, blocks, num_layers)
        else:
            small = _small(name, value, blocks, ids)
        if small != value:
            settings[name] = small
    if isinstance(
        raw.get("qk_rope_head_dim"), int
    ):  # latent attention: `head_dim` is the rotary part of a head, or the whole head
        settings["num_key_value_heads"] = 4
        if "head_dim" in raw:
            rotary = raw["head_dim"] in (None, raw["qk_rope_head_dim"])
            settings["head_dim"] = _ROTARY_DIM if rotary else _LATENT_HEAD_DIM
    return settings


def _small(name, value, blocks, ids):
    """Value of a setting in a tiny model."""
    if name in _ENDS:
        return None if value is None else _ENDS[name]
    if name == "is_decoder":
        return True
    if name == "head_dim":
        return _HEAD_DIM
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name in _COUNTS:
        return blocks
    if name in _SIZES:
        return _SIZES[name] if value > 0 else value
    if value > _LAST_ID // 2 and name.endswith(("_id", "_index")):
        return ids.setdefault(name, _LAST_ID - len(ids))
    return value


def _shortened(name, values, blocks, num_layers):
    """List with one value per block, in which every kind of block is kept, or list of some blocks; other lists unchanged."""
    if not values or not num_layers or isinstance(values[0], (list, tuple, dict)):
        return values
    if len(values) == num_layers:
        kinds = [_SIZES[name]] if name in _SIZES else list(dict.fromkeys(values))
        return [kinds[index % len(kinds)] for index in range(blocks)]
    if name.endswith(("layers", "layer_ids", "indexes", "idxs")):
        return list(range(1, blocks, 2))
    return values


def _rope(values, head_dim, axes):
    """Parameters of rotary embeddings for heads with `head_dim` channels, and `axes` axes of positions if it is not zero."""
    if all(isinstance(inner, dict) for inner in values.values()):
        return {kind: _rope(inner, head_dim, axes) for kind, inner in values.items()}
    half = int(head_dim * values.get("partial_rotary_factor", 1)) // 2
    small = dict(values)
    axes = len(values.get("mrope_section") or ()) or axes
    if axes:
        rest = [half * 3 // 8] * (axes - 1)
        small["mrope_section"] = [half - sum(rest), *rest]
    return small | {name: [1.0] * half for name in ("short_factor", "long_factor") if values.get(name)}


def _override(settings, path, value):
    """Set one setting. Dots in its path lead into parts; the value "default" takes the setting out."""
    *parts, name = path.split(".")
    for part in parts:
        settings = settings.setdefault(part, {})
    if value == "default":
        settings.pop(name, None)
    else:
        settings[name] = value


def auto_class(config):
    """Auto class with which checkpoints of a type are published: with the image tower if the type has one."""
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM


@torch.no_grad()
def _randomize(model):
    """Give all parameters values of ordinary size. Vectors and decay rates keep their initial values, with noise."""
    generator = torch.Generator().manual_seed(0)
    stored = {name for name in model.state_dict() if name.endswith(("bias", "scalar"))}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not value.is_floating_point() or not (isinstance(value, torch.nn.Parameter) or name in stored):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() < 2 or name.endswith("A_log"):
            value.add_(0.1 * noise)
        else:
            value.copy_(0.08 * noise)


@torch.no_grad()
def logits_of(model, name, ids_NS):
    """Logits float32 [N, S, V] of each segment alone, of a model of a type or variant."""
    model = model.get_submodule(_row(name).get("_run", ""))
    return torch.stack([model(input_ids=row.unsqueeze(0), use_cache=False).logits[0].float() for row in ids_NS])


def _require_meaning(reference, logits):
    """Check that the logits of the loaded model are those of the saved one, and depend on the tokens.

    Raises:
        NotBuildableError: they do not.
    """
    if reference.shape[:2] != (_SEGMENTS, _LENGTH):
        raise NotBuildableError(f"forward: {reference.shape[1]} logits for {_LENGTH} tokens")
    if not torch.isfinite(reference).all():
        raise NotBuildableError("forward: logits are not finite")
    apart = difference(reference, logits)
    if apart > NEAR:
        raise NotBuildableError(f"load: the loaded model has other logits than the saved one, by {apart:.1e}")
    if min(difference(*reference), difference(reference[0, 1:], reference[0, :-1])) < 0.05:
        raise NotBuildableError("forward: logits do not depend on the tokens")
