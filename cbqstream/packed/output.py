"""Assembly of the folder of a finished checkpoint, and the checks of its place and its checksums.

The folder has links to the shards of the blocks, or copies of them, and copies of the other tensors and files of the source. The index and
config.json are written last. `SHA256SUMS` has the checksum of every shard, in the format of `sha256sum --check`.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbqstream.checkpoint.folder import INDEX, QUANTIZED_BESIDE, shards_of
from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.tensors import ModelTensor, StoredTensors
from cbqstream.disk import Disk, digest_of_file, is_occupied
from cbqstream.errors import InputError, UsageError
from cbqstream.packed.shard import copy_tensors

REST = "rest.safetensors"
"""File name of the shard with the tensors that are copied from the source."""
SUMS = "SHA256SUMS"
"""File name of the list of checksums."""
WEIGHTS = frozenset(
    f".{kind}"
    for kind in (
        *("safetensors", "bin", "pt", "pth", "ckpt", "h5", "msgpack", "gguf", "ggml", "distcp", "nemo"),
        *("onnx", "onnx_data", "tflite", "mlmodel", "engine"),
    )
)
"""Suffixes of files that hold weights."""
_MOST_IN_SUBFOLDER = 64 << 20
"""Largest total size in bytes of the files of a subfolder that is copied."""


@dataclass(frozen=True, slots=True)
class OtherFiles:
    """Files of a model folder besides its shards, as paths in the folder."""

    copied: tuple[str, ...]
    """Small files without weights: the tokenizer, and subfolders such as `1_Pooling`. A result gets them."""
    left_out: tuple[str, ...]
    """Weights that are not part of the model, and subfolders with such files, with links to folders, or of more than 64 MiB (`onnx/`)."""


def other_files(folder: Path) -> OtherFiles:
    """Find the files of a model folder that a result gets, and those that it does not get.

    Shards of the model, config.json, the index, descriptions of a quantized source and hidden subfolders are neither. A subfolder is
    copied as a whole or not at all.

    Raises:
        InputError: the folder has no shards, see `shards_of`.
    """
    replaced = {"config.json", INDEX, *QUANTIZED_BESIDE, *shards_of(folder)}
    copied: list[str] = []
    left_out: list[str] = []
    for entry in sorted(folder.iterdir()):
        if entry.name in replaced:
            continue
        if not entry.is_dir():
            (copied if _is_copied(entry) else left_out).append(entry.name)
        elif not entry.name.startswith("."):
            paths = {path.relative_to(folder).as_posix(): path for path in _entries_below(entry)}
            others = [name for name in paths if name not in replaced]
            small = all(_is_copied(paths[name]) for name in others) and not entry.is_symlink()
            if small and sum(paths[name].stat().st_size for name in others) <= _MOST_IN_SUBFOLDER:
                copied += others
            else:
                left_out.append(f"{entry.name}/")
    return OtherFiles(tuple(copied), tuple(left_out))


def _is_copied(path: Path) -> bool:
    """Whether a path is a file, or a link to one, that holds no weights."""
    return path.is_file() and path.suffix not in WEIGHTS


def _entries_below(folder: Path) -> Iterator[Path]:
    """Files and links in a folder and its subfolders, without hidden subfolders. Links to folders are not followed."""
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        links = [name for name in subfolders if Path(place, name).is_symlink()]
        yield from (Path(place, name) for name in sorted([*names, *links]))


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
    rest: Mapping[str, ModelTensor],
    config: dict[str, Any],
    texts: Mapping[str, str],
) -> None:
    """Make the folder `out` from the shards of the blocks and the source. It has the path `building` until it is complete.

    Args:
        disk: used for durable writes.
        out: path of the result; it must not exist, or be an empty folder.
        building: path until the folder is complete, see `building_folder`.
        source_folder: folder of the source. Its tokenizer and other files are copied byte for byte, see `other_files`.
        source: tensors of the source.
        shards: paths of the shards of the finished blocks, and the SHA-256 of each.
        rest: tensors of the source that the shards do not replace, by name. They are copied.
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
        source_folder: folder of the source. Its files by `other_files` that `building` does not have are copied byte for byte.
        weight_map: file name of the shard of each tensor, by the name of the tensor.
        sums: SHA-256 of each shard, by its file name.
        config: content of the new config.json, which is written last.
    """
    table = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items()))
    disk.write(building / SUMS, [table.encode()], mode=0o666)
    _copy_files(disk, source_folder, building, other_files(source_folder).copied)
    total = sum((building / name).stat().st_size for name in set(weight_map.values()))
    _write_json(
        disk, building / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )
    _write_json(disk, building / "config.json", config)
    disk.publish(building, out)


def _copy_files(disk: Disk, source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy files that `target` does not have, with their subfolders, which become durable and have ordinary permissions.

    Args:
        disk: used for durable writes.
        source: folder of the files.
        target: folder to fill.
        names: paths of the files in both folders; those of one subfolder follow each other.
    """
    made: set[Path] = set()
    for name in names:
        place = target / name
        for folder in reversed(place.relative_to(target).parents[:-1]):
            if folder not in made:
                disk.make_folder(target / folder, mode=0o777)
                made.add(folder)
        if not place.exists():
            disk.copy(source / name, place)
    for folder in sorted(made, reverse=True):
        disk.sync_folder(target / folder)


def require_sums(folder: Path, shards: Iterable[Path], intact: Mapping[str, str]) -> int | None:
    """Compare the shards of a model folder with its list of checksums.

    Args:
        folder: the model folder.
        shards: its shards.
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
    for shard in sorted(shards):
        name = shard.relative_to(folder).as_posix()
        if name not in sums:
            raise InputError(shard, f"is not listed in {SUMS}. Copy the model again, or remove {SUMS}.")
        if sums[name] != (intact.get(shard.name) or digest_of_file(shard).sha256):
            raise InputError(shard, f"is not what was written (its SHA-256 does not match {SUMS}). Copy it again.")
    return len(sums)


def _write_json(disk: Disk, path: Path, value: dict[str, Any]) -> None:
    disk.write(path, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()], mode=0o666)
