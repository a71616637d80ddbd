"""A finished model in another format: shard by shard, from its codes and scales. Nothing is searched for or rounded again."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbqstream.checkpoint.folder import read_json
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.config import LayerSchemes
from cbqstream.disk import Disk
from cbqstream.errors import InputError, UsageError
from cbqstream.evaluate.model import open_model
from cbqstream.packed.exports import EXPORTS, GGUF, require_exact, require_whole_words
from cbqstream.packed.format import INPUT_SCALE, PACKED, SCALE, SHAPE, ZERO_POINT, decode, schemes_of
from cbqstream.packed.gguf_file import Layers, write_gguf
from cbqstream.packed.output import building_folder, complete_folder
from cbqstream.packed.shard import copy_tensors, write_tensors
from cbqstream.records import QuantizedWeight

_PARTS = (PACKED, SCALE, SHAPE, ZERO_POINT)
CPU = torch.device("cpu")


def export(model: Path, out: Path, format_name: str, disk: Disk | None = None) -> Path:
    """Write `model`, a result of `quantize`, into `out` in another format. At most one shard of the result is in memory.

    Raises:
        UsageError: the format cannot hold it exactly, or `out` is occupied.
        InputError: it is not a quantized model, or is damaged.
    """
    disk = disk or Disk()
    config = read_json(model, "config.json")
    if not config.get("quantization_config"):
        raise InputError(model / "config.json", "the model is not quantized. Give a result of cbqstream quantize.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not empty. Give another folder.")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder. Create it first.")
    require_exact(format_name, schemes_of(config["quantization_config"]))
    source, building = Checkpoint.open(model), building_folder(out, format_name)
    if format_name == GGUF:
        _gguf(disk, model, out, building, config, source)
    else:
        _shards(disk, model, out, building, config, source, format_name)
    return out


def _gguf(disk: Disk, model: Path, out: Path, building: Path, config: dict[str, Any], source: Checkpoint) -> None:
    schemes = schemes_of(config["quantization_config"])
    disk.remove_tree(building)
    disk.make_folder(building)
    file = building / f"model-W{schemes.default.num_bits}.gguf"
    write_gguf(file, model, open_model(model)[0].config.to_dict(), schemes, _all_layers(source, schemes))
    disk.sync_file(file)
    disk.publish(building, out)


def _shards(
    disk: Disk, model: Path, out: Path, building: Path, config: dict[str, Any], source: Checkpoint, format_name: str
) -> None:
    schemes = schemes_of(config["quantization_config"])
    for layer in _layers(source.infos):
        if f"{layer}.{SHAPE}" in source.infos:
            shape = source.read(f"{layer}.{SHAPE}", device=CPU).tolist()
            require_whole_words(format_name, layer, shape, schemes.of(layer))
    disk.remove_tree(building)
    disk.make_folder(building)
    weight_map: dict[str, str] = {}
    for file in sorted({info.file for info in source.infos.values()}):
        names = _write_shard(disk, building / file.name, source, file, schemes, format_name)
        weight_map.update(dict.fromkeys(names, file.name))
    found = {key: value for key, value in config.items() if key != "quantization_config"}
    ignored = _modules(config["quantization_config"]["ignore"], source.infos)
    said = EXPORTS[format_name].config(schemes.default, ignored)
    found |= {} if said is None else {"quantization_config": said}
    complete_folder(disk, out, building, source_folder=model, weight_map=weight_map, config=found)


def _layers(names: Iterable[str]) -> list[str]:
    """Module paths of the quantized layers among tensors."""
    return [name.removesuffix(f".{PACKED}") for name in names if name.endswith(f".{PACKED}")]


def _all_layers(source: Checkpoint, schemes: LayerSchemes) -> Layers:
    packed = {}
    for layer in _layers(source.infos):
        rows, columns = source.read(f"{layer}.{SHAPE}", device=CPU).tolist()
        packed[layer] = (int(rows), int(columns))
    parts = {f"{layer}.{part}" for layer in packed for part in (*_PARTS, INPUT_SCALE)}
    others = {name: (info.shape, info.dtype) for name, info in source.infos.items() if name not in parts}
    return Layers(
        packed, others, lambda layer: _read(source, layer, schemes), lambda name: source.read(name, device=CPU)
    )


def _read(source: Checkpoint, layer: str, schemes: LayerSchemes) -> QuantizedWeight:
    """One quantized layer.

    Raises:
        InputError: a part of it is missing.
    """
    parts = {part: source.read(f"{layer}.{part}", device=CPU) for part in _PARTS if f"{layer}.{part}" in source.infos}
    missing = [part for part in (SCALE, SHAPE) if part not in parts]
    if missing:
        raise InputError(source.infos[f"{layer}.{PACKED}"].file, f"{missing[0]} is missing.", tensor=layer)
    return decode(parts, schemes.of(layer))


def _modules(ignored: list[str], names: Iterable[str]) -> list[str]:
    """Paths of the modules that compressed-tensors was told to ignore; of patterns, those that have a weight of their own."""
    patterns = [name.removeprefix("re:") for name in ignored if name.startswith("re:")]
    whole = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    matched = [path for path in whole if any(re.match(pattern, path) for pattern in patterns)]
    return [*(name for name in ignored if not name.startswith("re:")), *matched]


def _write_shard(
    disk: Disk, path: Path, source: Checkpoint, file: Path, schemes: LayerSchemes, format_name: str
) -> list[str]:
    """One shard in the new format; the names of its tensors."""
    here = [name for name, info in source.infos.items() if info.file == file]
    layers = _layers(here)
    if not layers:
        copy_tensors(disk, path, source, here)
        return here
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        scale_dtype = source.infos[f"{layer}.{SCALE}"].dtype
        encoded = EXPORTS[format_name].encode(_read(source, layer, schemes), scale_dtype)
        tensors |= {f"{layer}.{part}": value for part, value in encoded.items()}
    stored = {f"{layer}.{part}" for layer in layers for part in (*_PARTS, INPUT_SCALE)}
    tensors |= {name: source.read(name, device=CPU) for name in here if name not in stored}
    write_tensors(disk, path, tensors)
    return list(tensors)
