"""Assembly of the folder of a finished checkpoint, and the checks of its place and its checksums.

The folder has links to the shards of the blocks, or copies of them, and copies of the other tensors and files of the source. The index and
config.json are written last. `SHA256SUMS` has the checksum of every shard, in the format of `sha256sum --check`.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cbqstream.checkpoint.folder import INDEX, find_tensors
from cbqstream.checkpoint.header import read_header
from cbqstream.disk import Disk, digest_of_file, is_occupied
from cbqstream.errors import InputError, UsageError
from cbqstream.packed.shard import copy_tensors
from cbqstream.records import StoredTensors

REST = "rest.safetensors"
"""File name of the shard with the tensors that are copied from the source."""
SUMS = "SHA256SUMS"
"""File name of the list of checksums."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def require_replaceable(out: Path) -> None:
    """Check that a finished folder can be renamed to `out`.

    Raises:
        UsageError: `out` is a link or a mount point.
    """
    # an absolute path, because `is_mount` compares a path with its parent, and the parent of "." is "."
    if out.is_symlink() or out.absolute().is_mount():
        raise UsageError(
            f"{out}: a link or a mount point, which a finished folder cannot replace. Use a folder inside it."
        )


def require_free(out: Path, other: str) -> None:
    """Check that a new folder can be written at `out`.

    Args:
        out: path of the new folder.
        other: argument for which the message asks for another value.

    Raises:
        UsageError: `out` is a link or a mount point or is not empty, or its parent folder does not exist.
    """
    require_replaceable(out)
    if is_occupied(out):
        raise UsageError(f"{out}: exists and is not empty. Give another {other}.")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder. Create it first.")


@contextmanager
def filled_folder(disk: Disk, out: Path, digest: str) -> Iterator[Path]:
    """Make a folder to fill inside a `with`, and to publish as `out`. An error or an interruption deletes it.

    Args:
        disk: used for all writes.
        out: path of the folder when it is complete.
        digest: text that makes the name of the unfinished folder unique, see `building_folder`.
    """
    building = building_folder(out, digest)
    disk.remove_tree(building)
    disk.make_folder(building)
    with ExitStack() as leftovers:
        leftovers.callback(disk.remove_tree, building)
        yield building
        leftovers.pop_all()


def building_folder(out: Path, digest: str) -> Path:
    """Path of the folder `out` until it is complete.

    The path depends on the digest of the run, so that two runs never fill the same folder. Existing content of the folder is deleted.

    Args:
        out: path of the complete folder.
        digest: digest of the run; the first eight characters become part of the name.
    """
    return out.with_name(f"{out.name}.{digest[:8]}.cbqstream.tmp")


def assemble(
    disk: Disk,
    out: Path,
    building: Path,
    *,
    source_folder: Path,
    source: StoredTensors,
    shards: Mapping[Path, str],
    replaced: set[str],
    config: dict[str, Any],
    texts: Mapping[str, str],
) -> None:
    """Make the folder `out` from the shards of the blocks and the source. It has the path `building` until it is complete.

    Args:
        disk: used for durable writes.
        out: path of the result; it must not exist, or be an empty folder.
        building: path until the folder is complete, see `building_folder`.
        source_folder: folder of the source. Its tokenizer and other files are copied byte for byte; its weights are not.
        source: tensors of the source.
        shards: paths of the shards of the finished blocks, and the SHA-256 of each.
        replaced: names of the tensors of the source that the shards replace; all other tensors are copied byte for byte.
        config: content of the new config.json.
        texts: text files to write, by name. They replace files of the source that have the same name.
    """
    disk.remove_tree(building)
    disk.make_folder(building)
    weight_map: dict[str, str] = {}
    sums: dict[str, str] = {}
    for shard, sha256 in shards.items():
        sums[shard.name] = sha256
        disk.link_or_copy(shard, building / shard.name)
        weight_map.update(dict.fromkeys(read_header(shard), shard.name))
    rest = [name for name in source.infos if name not in replaced]
    sums[REST] = copy_tensors(disk, building / REST, source, rest).sha256
    weight_map.update(dict.fromkeys(rest, REST))
    for name, text in texts.items():
        disk.write(building / name, [text.encode()], mode=0o666)
    complete_folder(disk, out, building, source_folder=source_folder, weight_map=weight_map, sums=sums, config=config)


def complete_folder(
    disk: Disk,
    out: Path,
    building: Path,
    *,
    source_folder: Path,
    weight_map: Mapping[str, str],
    sums: Mapping[str, str],
    config: dict[str, Any],
) -> None:
    """Add checksums, files of the source, index and config.json to the shards in `building`, and rename the folder to `out`.

    Args:
        disk: used for durable writes.
        out: path of the result; it must not exist, or be an empty folder.
        building: folder with all shards.
        source_folder: folder of the source. Files that are not weights, and that `building` does not have, are copied byte for byte.
        weight_map: file name of the shard of each tensor, by the name of the tensor.
        sums: SHA-256 of each shard, by its file name.
        config: content of the new config.json, which is written last.
    """
    table = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items()))
    disk.write(building / SUMS, [table.encode()], mode=0o666)
    for file in sorted(source_folder.iterdir()):
        is_replaced = file.name in ("config.json", INDEX) or file.suffix in _WEIGHTS
        if file.is_file() and not is_replaced and not (building / file.name).exists():
            disk.copy(file, building / file.name)
    total = sum((building / name).stat().st_size for name in set(weight_map.values()))
    _write_json(
        disk, building / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )
    _write_json(disk, building / "config.json", config)
    disk.publish(building, out)


def require_sums(folder: Path, intact: Mapping[str, str]) -> int | None:
    """Compare the shards of a model folder with its list of checksums.

    Args:
        folder: the model folder.
        intact: SHA-256 of the shards that were verified already, by file name. All other shards are read.

    Returns:
        Number of checksums in the list, or None if the folder has no list.

    Raises:
        InputError: the list cannot be read, or a shard has another checksum or none.
    """
    file = folder / SUMS
    if not file.is_file():
        return None
    try:
        lines = [line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        sums = {name.removeprefix("*"): sha256.lower() for sha256, name in lines}
    except ValueError as error:
        raise InputError(file, "not a list of checksums. Remove it, or copy it again.") from error
    for shard in sorted({info.file for info in find_tensors(folder).values()}):
        if sums.get(shard.relative_to(folder).as_posix()) != (intact.get(shard.name) or digest_of_file(shard).sha256):
            raise InputError(shard, f"is not what was written (its SHA-256 does not match {SUMS}). Copy it again.")
    return len(sums)


def _write_json(disk: Disk, path: Path, value: dict[str, Any]) -> None:
    disk.write(path, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()], mode=0o666)
