"""Export of a finished model to another format, shard by shard, with the same codes and scales; or of any source as a dense model."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from cbqstream.checkpoint.decoding import decoded_tensors
from cbqstream.checkpoint.folder import find_tensors, quantization_of, read_json, without_quantization
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.tensors import ModelTensor
from cbqstream.disk import Disk, FileDigest
from cbqstream.errors import UsageError
from cbqstream.models.families import EXPERT, joined_with
from cbqstream.models.meta_model import MetaModel
from cbqstream.packed.exports import DENSE, EXPORTS, GGUF, require_exact, require_whole_words
from cbqstream.packed.format import schemes_if_own, schemes_of_result
from cbqstream.packed.gguf_file import write_gguf
from cbqstream.packed.output import complete_folder, filled_folder, require_free
from cbqstream.packed.packed_checkpoint import CPU, PackedCheckpoint
from cbqstream.packed.shard import copy_tensors, write_tensors
from cbqstream.runtime.offload import OffloadedTensor


def export(model: Path, out: Path, format_name: str, disk: Disk | None = None, *, allow_links: bool = False) -> Path:
    """Write a finished model into a new folder in another format. One layer is in memory at a time.

    Args:
        model: folder of a result of `quantize`; for `dense`, of any quantized model that `quantize` reads.
        out: folder to write; it must not exist, or be empty.
        format_name: a name in `EXPORTS`, or `gguf`.
        disk: used for durable writes; a new one by default.
        allow_links: read shards that are links to files outside the model folder.

    Returns:
        Absolute path of `out`.

    Raises:
        UsageError: the format cannot represent the model exactly, or `out` is occupied.
        InputError: the model is not quantized, or is damaged.
    """
    disk, out = disk or Disk(), out.absolute()
    config = read_json(model, "config.json")
    quantization = quantization_of(model, config)
    if format_name == DENSE and quantization is not None and schemes_if_own(quantization) is None:
        return _decode(disk, model, out, config, allow_links=allow_links)
    schemes = schemes_of_result(model, config)
    require_free(out, "folder")
    require_exact(format_name, schemes)
    source = PackedCheckpoint(Checkpoint.open(model, allow_links=allow_links), schemes)
    with filled_folder(disk, out, format_name) as building:
        if format_name == GGUF:
            _write_gguf(disk, model, building, config, source)
            disk.publish(building, out)
        else:
            weight_map, sums = _write_shards(disk, model, building, source, format_name)
            new = _config(config, quantization or {}, source, format_name)
            complete_folder(disk, out, building, source_folder=model, weight_map=weight_map, sums=sums, config=new)
    return out


def _decode(disk: Disk, model: Path, out: Path, config: dict[str, Any], *, allow_links: bool) -> Path:
    """Write a model that another program quantized as a dense one.

    Raises:
        InputError: it is quantized in a way that is not read, or a tensor has a dtype that is only copied.
        UsageError: `out` is occupied.
    """
    require_free(out, "folder")
    stored = find_tensors(model, allow_links=allow_links)
    source = Checkpoint(decoded_tensors(model, config, stored), stored)
    by_file: dict[Path, dict[str, ModelTensor]] = {}
    for name, info in source.infos.items():
        info.require_readable()
        by_file.setdefault(info.file, {})[name] = info
    weight_map: dict[str, str] = {}
    sums: dict[str, str] = {}
    with filled_folder(disk, out, DENSE) as building:
        for file in sorted(by_file):
            shard = _shard_name(model, file)
            sums[shard] = copy_tensors(disk, building / shard, source, by_file[file]).sha256
            weight_map.update(dict.fromkeys(by_file[file], shard))
        new = without_quantization(config)
        complete_folder(disk, out, building, source_folder=model, weight_map=weight_map, sums=sums, config=new)
    return out


def _shard_name(model: Path, file: Path) -> str:
    """File name for a shard of a model. Those from subfolders have the name of the subfolder before theirs."""
    return "-".join(file.relative_to(model).parts)


def _write_gguf(disk: Disk, model: Path, building: Path, config: dict[str, Any], source: PackedCheckpoint) -> None:
    meta_model = MetaModel(model, config, source.infos)
    file = building / f"model-W{source.schemes.default.num_bits}.gguf"
    with disk.written_by_a_library(file):
        write_gguf(file, model, meta_model.config.to_dict(), source)


def _write_shards(
    disk: Disk, model: Path, building: Path, source: PackedCheckpoint, format_name: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Write the shards in the new format.

    Returns:
        File name of the shard of each tensor, and SHA-256 of each shard.

    Raises:
        UsageError: the format does not support a layer.
    """
    for layer, shape in source.layers.items():
        if EXPORTS[format_name].only_blocks and not re.search(r"\.\d+\.", layer):
            raise UsageError(f"format {format_name} does not support a quantized {layer}. Use gguf or dense.")
        require_whole_words(format_name, layer, shape, source.schemes.of(layer))
    weight_map: dict[str, str] = {}
    sums: dict[str, str] = {}
    for file in sorted({info.file for info in source.checkpoint.stored.values()}):
        shard = _shard_name(model, file)
        names, digest = _write_shard(disk, building / shard, source, file, format_name)
        weight_map.update(dict.fromkeys(names, shard))
        sums[shard] = digest.sha256
    return weight_map, sums


def _write_shard(
    disk: Disk, path: Path, source: PackedCheckpoint, file: Path, format_name: str
) -> tuple[list[str], FileDigest]:
    """Write one shard in the new format.

    Args:
        disk: used for durable writes.
        path: file to write.
        source: the quantized model.
        file: shard of the quantized model whose tensors are written.
        format_name: name of the format.

    Returns:
        Names of the tensors, and digest of the file.
    """
    layers = [layer for layer in source.layers if source.file(layer) == file]
    others = [name for name, info in source.others.items() if info.file == file]
    if not layers:
        return others, copy_tensors(disk, path, source.checkpoint, {name: source.others[name] for name in others})
    tensors: dict[str, Tensor | OffloadedTensor] = {name: source.read(name, device=CPU) for name in others}
    # the header, which is written first, needs all shapes, so encoded layers are offloaded until then
    with disk.scratch(path.with_suffix(".layers")) as scratch:
        for layer in layers:
            encoded = EXPORTS[format_name].encode(source.packed(layer), source.scale_dtype(layer))
            tensors |= {f"{layer}.{part}": OffloadedTensor.of(value, scratch) for part, value in encoded.items()}
        return list(tensors), write_tensors(disk, path, tensors)


def _config(
    config: dict[str, Any], quantization: dict[str, Any], source: PackedCheckpoint, format_name: str
) -> dict[str, Any]:
    """Content of config.json with the quantization_config of the new format."""
    others = without_quantization(config)
    ignored = _modules(list(quantization.get("ignore") or ()), source.checkpoint.stored)
    # inference engines look all experts of a block up under one name
    experts = sorted({joined_with(path) for path in ignored if EXPERT.search(path)})
    made = EXPORTS[format_name].config(source.schemes.default, [*ignored, *experts], sorted(source.layers))
    return others if made is None else {**others, "quantization_config": made}


def _modules(ignored: list[str], names: Iterable[str]) -> list[str]:
    """Paths of the modules that are not quantized.

    Args:
        ignored: the entry `ignore` of a quantization_config: paths, and patterns after `re:`, which are replaced by the modules that they
            match.
        names: names of the tensors of the checkpoint.
    """
    patterns = [name.removeprefix("re:") for name in ignored if name.startswith("re:")]
    whole = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    matched = [path for path in whole if any(re.match(pattern, path) for pattern in patterns)]
    return [*(name for name in ignored if not name.startswith("re:")), *matched]
