"""Putting the finished checkpoint together: links to the shards of the blocks, copies of the rest, index and config.json last.

`SHA256SUMS` has the checksum of every shard, as `sha256sum --check` reads it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cbqstream.checkpoint.folder import INDEX, find_tensors
from cbqstream.checkpoint.header import read_header
from cbqstream.disk import Disk, digest_of_file
from cbqstream.errors import InputError, UsageError
from cbqstream.packed.shard import copy_tensors
from cbqstream.records import StoredTensors

REST = "rest.safetensors"
SUMS = "SHA256SUMS"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def is_occupied(out: Path) -> bool:
    """Whether something is in the way of a result."""
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def require_replaceable(out: Path) -> None:
    """Refuse a place that no finished folder can be renamed to.

    Raises:
        UsageError: it is a link or a mount point.
    """
    if out.is_symlink() or out.absolute().is_mount():  # of "." the parent is "."
        raise UsageError(
            f"{out}: a link or a mount point, which cannot be replaced by a finished folder. Use a folder in it."
        )


def require_free(out: Path, other: str) -> None:
    """Refuse a place that cannot become a new folder.

    Args:
        out: the place.
        other: what the user is to give instead.

    Raises:
        UsageError: something is there, or the folder that it would be in is not.
    """
    require_replaceable(out)
    if is_occupied(out):
        raise UsageError(f"{out}: exists and is not empty. Give another {other}.")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder. Create it first.")


@contextmanager
def filled_folder(disk: Disk, out: Path, digest: str) -> Iterator[Path]:
    """A folder to fill and to publish as `out`; it is deleted where something goes wrong before, an interruption too."""
    building = building_folder(out, digest)
    disk.remove_tree(building)
    disk.make_folder(building)
    with ExitStack() as leftovers:
        leftovers.callback(disk.remove_tree, building)
        yield building
        leftovers.pop_all()


def building_folder(out: Path, digest: str) -> Path:
    """What `out` is called until it is complete, for the run with this digest: two runs must not fill one folder.

    It belongs to this program: whatever lies there is deleted.
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
    """Make the folder `out` from the shards of the blocks; until its last rename it is called `building`.

    Args:
        disk: for durable writes.
        out: must not exist, or be empty.
        building: beside it, see `building_folder`.
        source_folder: its tokenizer and other files are copied byte for byte; its weights are not.
        source: its tensors.
        shards: finished blocks, and the SHA-256 of each.
        replaced: names of the source's tensors that the shards stand for; all others are copied byte for byte.
        config: content of the new config.json.
        texts: files that are written instead of those of the source, if it has such.
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
    """To what lies in `building` add what else a model folder has, config.json last, and call it `out`.

    Args:
        disk, out, building, source_folder, config: as above.
        weight_map: shard by tensor.
        sums: SHA-256 by shard.
    """
    table = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items()))
    disk.write(building / SUMS, [table.encode()], mode=0o666)
    for file in sorted(source_folder.iterdir()):
        is_ours = file.name in ("config.json", INDEX) or file.suffix in _WEIGHTS
        if file.is_file() and not is_ours and not (building / file.name).exists():
            disk.copy(file, building / file.name)
    total = sum((building / name).stat().st_size for name in set(weight_map.values()))
    _write_json(
        disk, building / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )
    _write_json(disk, building / "config.json", config)
    disk.publish(building, out)


def require_sums(folder: Path, intact: Mapping[str, str]) -> int | None:
    """Compare the shards of a folder with its checksums. How many there are; None where there are no checksums.

    Args:
        folder: of which all shards are read but those that are
        intact: by their name, the SHA-256 that they are known to have.

    Raises:
        InputError: one is not what was written, is missing, or has none.
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
        if sums.get(shard.name) != (intact.get(shard.name) or digest_of_file(shard).sha256):
            raise InputError(shard, f"is not what was written (by its SHA-256 in {SUMS}). Copy it again.")
    return len(sums)


def _write_json(disk: Disk, path: Path, value: dict[str, Any]) -> None:
    disk.write(path, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()], mode=0o666)
