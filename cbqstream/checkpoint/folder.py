"""Tensors and JSON files of a model folder.

The tensors are stored in one `model.safetensors`, or in shards that are listed in an index.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

from cbqstream.checkpoint.header import read_header
from cbqstream.errors import InputError, shown
from cbqstream.records import TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_JSON = {INDEX: 256 << 20, "tokenizer.json": 256 << 20, "tokenizer_config.json": 16 << 20}
_MAX_OTHER_JSON = 1 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from a file of a model folder.

    Raises:
        InputError: the folder or the file is missing, or the file is too large or is not a JSON object.
    """
    path = folder / name
    if not folder.is_dir():
        raise InputError(folder, "no such folder. Give the folder of a model with config.json and safetensors.")
    if not path.is_file():
        raise InputError(path, f"missing. A model folder has {name}.")
    limit = _MAX_JSON.get(name, _MAX_OTHER_JSON)
    if path.stat().st_size > limit:
        raise InputError(path, f"larger than {limit >> 20} MiB, which is not plausible.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=partial(_unique, path))
    except (ValueError, RecursionError) as error:
        raise InputError(path, "not JSON.") from error
    if not isinstance(value, dict):
        raise InputError(path, "not a JSON object.")
    return value


def is_size(value: Any) -> bool:
    """Whether a value of config.json, or a dimension of a weight, is a plausible size: an integer from 1 to 2^20."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1 << 20


def quant_method_of(quantization_config: object) -> str:
    """Name of the method in a `quantization_config` of config.json, safe to print; "None" if it has no name."""
    found = quantization_config.get("quant_method") if isinstance(quantization_config, dict) else None
    return shown(str(found))


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys; programs disagree about the value of a key that appears twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(path, f'"{shown(next(name for name in names if names.count(name) > 1))}" appears twice.')
    return value


def find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Find all tensors of a model folder by name, from headers alone.

    Raises:
        InputError: the folder has no safetensors, the index disagrees with the shards or names a file outside the folder, or a header is
            broken.
    """
    if (folder / INDEX).exists():
        return _from_index(folder)
    shards = sorted(folder.glob("*.safetensors"))
    if (folder / SINGLE).exists():
        shards = [folder / SINGLE]
    if len(shards) == 1:
        _require_inside(folder, shards[0])
        return read_header(shards[0])
    if shards:
        raise InputError(folder, f"{len(shards)} shards but no {INDEX}. Download it too.")
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise InputError(folder, "only pickle checkpoints, which are never read. Convert them to safetensors first.")
    raise InputError(folder, "no safetensors files.")


def _from_index(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(index, "not a weight index (no weight_map).")
    for shard in weight_map.values():
        if (
            not isinstance(shard, str)
            or not shard
            or Path(shard).name != shard
            or "\\" in shard
            or ":" in shard
            or not shard.isprintable()
        ):
            raise InputError(index, f'shard name "{shown(str(shard))}" leaves the model folder.')
    if (folder / SINGLE).exists() and SINGLE not in weight_map.values():
        raise InputError(folder, f"two layouts in one folder: {SINGLE}, and the shards of {INDEX}. Remove one.")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        named = {name for name, where in weight_map.items() if where == shard}
        if not (folder / shard).exists():
            raise InputError(folder / shard, f"missing ({len(named)} tensors). Download it again.")
        _require_inside(folder, folder / shard)
        held = read_header(folder / shard)
        for name in sorted(named ^ held.keys()):
            raise InputError(folder / shard, "index and shards disagree.", tensor=name)
        tensors.update(held)
    return tensors


def _require_inside(folder: Path, shard: Path) -> None:
    """Refuse a shard that is a link to a file outside the model folder.

    A link may lead to another file of the folder, or from a snapshot in the Hugging Face cache to the blobs of the cache.
    """
    real, home = shard.resolve(), folder.resolve()
    if home in real.parents or (home.parent.name == "snapshots" and home.parent.parent / "blobs" == real.parent):
        return
    raise InputError(shard, f"a link to {shown(str(real))}, outside the model. Copy the file into the folder.")
