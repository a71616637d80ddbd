"""Tensors and JSON files of a model folder.

The tensors are stored in one `model.safetensors`, or in shards that are listed in an index. A shard may be in a subfolder.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.tensors import TensorInfo
from cbqstream.errors import InputError, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_JSON = {
    INDEX: 256 << 20,
    "tokenizer.json": 256 << 20,
    "tokenizer_config.json": 16 << 20,
    "hf_quant_config.json": 64 << 20,
}
_MAX_OTHER_JSON = 1 << 20
_MAX_NAME = 255
_QUANTIZED = ("quantization_config", "compression_config")
"""Keys of config.json, or of a part of it such as text_config, that describe how a model is quantized."""
QUANTIZED_BESIDE = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files beside config.json in which some programs describe it instead, and the method if the file does not name it."""
_DEPTH = 3
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Files of an adapter that PEFT wrote."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from a file of a model folder.

    Raises:
        InputError: the folder or the file is missing, or the file is too large or is not a JSON object; or the file is config.json, and the
            folder has an adapter.
    """
    path = folder / name
    if not folder.is_dir():
        raise InputError(folder, "no such folder. Give the folder of a model with config.json and safetensors.")
    if name == "config.json":
        refuse_adapter(folder)
    if not path.is_file():
        raise InputError(path, f"missing. A model folder has {name}.")
    limit = _MAX_JSON.get(name, _MAX_OTHER_JSON)
    if path.stat().st_size > limit:
        raise InputError(path, f"larger than {limit >> 20} MiB, which is not plausible. Download it again.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=partial(_unique, path))
    except (ValueError, RecursionError) as error:
        raise InputError(path, "not JSON. Download it again.") from error
    if not isinstance(value, dict):
        raise InputError(path, "not a JSON object. Download it again.")
    return value


def refuse_adapter(folder: Path) -> None:
    """Check that a folder has no adapter, whose weights change those of the base model and would be left out.

    Raises:
        InputError: it has one.
    """
    for name in _ADAPTER:
        if (folder / name).exists():
            raise InputError(
                folder,
                f"holds a LoRA adapter ({name}), whose weights would be left out."
                " Merge it into the base model first (peft: merge_and_unload), then quantize the merged folder.",
            )


def is_size(value: Any) -> bool:
    """Whether a value of config.json, or a dimension of a weight, is a plausible size: an integer from 1 to 2^20."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1 << 20


def quantization_of(folder: Path, model: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` of a model folder, wherever it stands; None if the model is not quantized.

    Args:
        folder: folder of the model.
        model: content of its config.json.

    Raises:
        InputError: a file that describes how the model is quantized cannot be read.
    """
    found = find_quantization(folder, model)
    return None if found is None else found[1]


def find_quantization(folder: Path, model: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The place of a `quantization_config`, for messages, and its content with `quant_method`; see `quantization_of`."""
    inside = next(_quantized_parts(model, str(folder / "config.json")), None)
    if inside is not None:
        return inside
    for name, method in QUANTIZED_BESIDE.items():
        if (folder / name).exists():
            return str(folder / name), {"quant_method": method, **read_json(folder, name)}
    return None


def _quantized_parts(part: Mapping[str, Any], place: str, depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of each `quantization_config` in config.json or in a part of it, from the outside in."""
    for key in _QUANTIZED:
        if part.get(key):
            yield place, part[key] if isinstance(part[key], dict) else {}
    for name, inner in part.items():
        if isinstance(inner, dict) and depth < _DEPTH:
            yield from _quantized_parts(inner, f"{place}: {shown(name)}", depth + 1)


def without_quantization(part: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json, or of a part of it, without any `quantization_config`."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in part.items()
        if key not in _QUANTIZED
    }


def quant_method_of(quantization_config: object) -> str:
    """Name of the method in a `quantization_config`, safe to print; "None" if it has no name."""
    found = quantization_config.get("quant_method") if isinstance(quantization_config, dict) else None
    return shown(str(found))


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys; programs disagree about the value of a key that appears twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(path, f'"{shown(twice)}" appears twice. Remove one, or download the file again.')
    return value


def find_tensors(folder: Path, *, allow_links: bool = False) -> dict[str, TensorInfo]:
    """Find all tensors of a model folder by name, from headers alone.

    Args:
        folder: the model folder.
        allow_links: read shards that are links to files outside the folder.

    Raises:
        InputError: the folder has no safetensors, the index disagrees with the shards or names a file outside the folder, or a header is
            broken.
    """
    if not (folder / INDEX).exists():
        (shard,) = shards_of(folder)
        _require_inside(folder, folder / shard, allow_links=allow_links)
        return read_header(folder / shard)
    weight_map = _weight_map(folder)
    counts = Counter(weight_map.values())
    if (folder / SINGLE).exists() and SINGLE not in counts:
        raise InputError(folder, f"two layouts in one folder: {SINGLE}, and the shards of {INDEX}. Remove one.")
    held = {}
    for shard, count in sorted(counts.items()):
        path = folder / shard
        if not path.exists() and not path.is_symlink():
            raise InputError(path, f"missing ({count} tensors). Download it again.")
        _require_inside(folder, path, allow_links=allow_links)
        held[shard] = read_header(path)
    _require_agreement(folder, weight_map, held)
    return {name: info for tensors in held.values() for name, info in tensors.items()}


def shards_of(folder: Path) -> list[str]:
    """Paths in a model folder of the files that hold its tensors: `model.safetensors`, or the shards that the index lists.

    Raises:
        InputError: the folder has no safetensors, or several without an index; or the index is not valid, or names a file outside the
            folder.
    """
    if (folder / INDEX).exists():
        return sorted(set(_weight_map(folder).values()))
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE in shards:
        return [SINGLE]
    if len(shards) == 1:
        return shards
    if shards:
        raise InputError(folder, f"{len(shards)} shards but no {INDEX}. Download it too.")
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise InputError(folder, "only pickle checkpoints, which are never read. Convert them to safetensors first.")
    raise InputError(folder, "no safetensors files. Download the weights, or give another folder.")


def _weight_map(folder: Path) -> dict[str, str]:
    """Path in the folder of the shard of each tensor, from the index.

    Raises:
        InputError: the index is not valid, or names a file outside the folder.
    """
    index = folder / INDEX
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(index, "not a weight index (no weight_map). Download it again.")
    shards: dict[str, str] = {}
    for given in weight_map.values():
        if not isinstance(given, str) or given not in shards:
            shards[given] = _checked_name(index, given)
    return {name: shards[given] for name, given in weight_map.items()}


def _checked_name(index: Path, given: object) -> str:
    """Path of a shard in the model folder, as an index gives it.

    Raises:
        InputError: it is not a path inside the folder.
    """
    path, wrong = PurePosixPath(given if isinstance(given, str) else ""), "is not valid"
    if path.is_absolute() or ".." in path.parts:
        wrong = "leaves the model folder"
    elif (
        path.parts
        and str(path).isprintable()
        and not {"\\", ":"} & {*str(path)}
        and len(str(path).encode()) <= _MAX_NAME
    ):
        return str(path)
    raise InputError(index, f'shard name "{shown(str(given))}" {wrong}. Download the index again.')


def _require_agreement(
    folder: Path, weight_map: Mapping[str, str], held: Mapping[str, Mapping[str, TensorInfo]]
) -> None:
    """Check that the shards hold the tensors that the index lists for them, and no others.

    Args:
        folder: the model folder.
        weight_map: shard of each tensor by the index.
        held: tensors of each shard by its header.

    Raises:
        InputError: they do not; the message names the tensor and both places.
    """
    found = {name: shard for shard, tensors in held.items() for name in tensors}
    for name, shard in sorted(weight_map.items()):
        if name in held[shard]:
            continue
        if name in found:
            problem = f"is in {found[name]}, but the index lists it for {shard}. Download the index again."
            raise InputError(folder / INDEX, problem, tensor=name)
        problem = f"is in no shard, but {INDEX} lists it for this one. Download both again."
        raise InputError(folder / shard, problem, tensor=name)
    for shard, tensors in held.items():
        for name in tensors:
            if name not in weight_map:
                problem = f"is in this shard, but not in {INDEX}. Download both again."
                raise InputError(folder / shard, problem, tensor=name)
            if weight_map[name] != shard:
                problem = f"is in this shard and in {weight_map[name]}. Download the model again."
                raise InputError(folder / shard, problem, tensor=name)


def _require_inside(folder: Path, shard: Path, *, allow_links: bool) -> None:
    """Refuse a shard that is a link to nothing, or to a file outside the model folder unless such links are allowed.

    A link may lead to another file of the folder, or from a snapshot in the Hugging Face cache to the blobs of the cache.
    """
    if shard.is_symlink() and not shard.exists():
        raise InputError(shard, f"a link to {shown(str(shard.readlink()))}, which does not exist. Restore the file.")
    real, home = shard.resolve(), folder.resolve()
    if (
        allow_links
        or home in real.parents
        or (home.parent.name == "snapshots" and home.parent.parent / "blobs" == real.parent)
    ):
        return
    raise InputError(
        shard,
        f"a link to {shown(str(real))}, outside the model. If you trust it, give --allow-links; or copy the file into the folder.",
    )
