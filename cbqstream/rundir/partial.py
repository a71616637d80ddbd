"""Results inside a window that is not committed yet, for windows that take hours: a process that is killed loses one of them at most.

A result is a file of tensors and a sealed record, which names the file, the newest commit and the numerics. The file is renamed into place
first and the record last, so a file without a record does not exist. The commit of the window makes all of them worthless.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from cbqstream.disk import Disk, FileDigest, digest_of_file
from cbqstream.records import Numerics
from cbqstream.rundir.identity import canonical
from cbqstream.rundir.records import is_sealed, sealed

PARTIAL = "partial"
"""Folder of the results inside a window that is not committed."""


class PartialResult(NamedTuple):
    """A result inside a window."""

    file: Path
    """Its tensors, a safetensors file."""
    facts: dict[str, Any]
    """Plain values beside the tensors."""


def facts_inside(run: Path, prev: str) -> dict[str, dict[str, Any]]:
    """Facts of the results inside the next window of a run, by name. The files of the tensors are not looked at.

    Args:
        run: the run directory.
        prev: digest of the newest record of the run.
    """
    found = {}
    for record in sorted((run / PARTIAL).glob("*.json")):
        values = _read(record)
        if values is not None and values.get("prev") == prev:
            found[record.stem] = values["facts"]
    return found


def _read(record: Path) -> dict[str, Any] | None:
    """Values of a record of a result; None if it is missing or damaged."""
    try:
        values = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and isinstance(values.get("facts"), dict) and is_sealed(values) else None


class PartialResults:
    """The results inside the next window of a run.

    Args:
        folder: their folder.
        building: folder in which files are written.
        disk: does the writing.
        prev: digest of the newest record of the run.
        numerics: numerics of the results; results of other numerics are not used.
    """

    def __init__(self, folder: Path, building: Path, disk: Disk, prev: str, numerics: Numerics) -> None:
        self._folder, self._building, self.disk = folder, building, disk
        self._belongs = {"prev": prev, "numerics": asdict(numerics)}

    def find(self, name: str) -> PartialResult | None:
        """A finished and undamaged result; None if there is none."""
        record, file = self._folder / f"{name}.json", self._folder / f"{name}.safetensors"
        values = _read(record)
        if values is None or any(values.get(key) != value for key, value in self._belongs.items()):
            return None
        if not file.is_file() or digest_of_file(file) != FileDigest(values.get("size", 0), values.get("sha256", "")):
            return None
        return PartialResult(file, values["facts"])

    def add(self, name: str, write: Callable[[Path], FileDigest], facts: Mapping[str, Any]) -> PartialResult:
        """Make a result durable.

        Args:
            name: name of the result.
            write: writes the file of the tensors, durably.
            facts: plain values beside the tensors.

        Raises:
            StorageError: the disk refused an operation.
        """
        if not self._folder.exists():
            self.disk.make_folder(self._folder)
            self.disk.sync_folder(self._folder.parent)
        made, file = self._building / f"{name}.safetensors", self._folder / f"{name}.safetensors"
        digest = write(made)
        pending, record = self._building / f"{name}.json", self._folder / f"{name}.json"
        body = {**self._belongs, "size": digest.size, "sha256": digest.sha256, "facts": dict(facts)}
        self.disk.write(pending, [canonical(sealed(body))])
        for source, target in ((made, file), (pending, record)):
            if target.exists():  # of a damaged or foreign result
                self.disk.remove_file(target)
            self.disk.rename(source, target)
        self.disk.sync_folder(self._folder)
        return PartialResult(file, dict(facts))
