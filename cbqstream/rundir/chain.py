"""What a run directory says, read and checked: run.json, and the chain of commits that hangs on it. Nothing here writes.

run.json and every commit name their own SHA-256 as `self`, and every commit that of the record before it as `prev`, the first one that
of run.json: a record that was changed, lost, or brought from another run does not fit.
"""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cbqstream.disk import digest_of_file
from cbqstream.errors import IdentityError, InputError
from cbqstream.rundir.identity import FORMAT, digest_of

CARRY = "carry.safetensors"
"""What the blocks that stay in the next window carry over; beside the shards of those that left."""
REFERENCE, QUANTIZED = "reference", "quantized"
"""The two streams of hidden states: of the original model, and of the one that is being made."""
RESTORE = "Restore the run directory, or use another --run-dir."

CARRIES_KEPT = 2
"""The newest; all would be as large as the model. The next window reads one, the other makes it possible to take a window back."""
_MAX_RECORD = 256 << 20
_RUN_FIELDS = {"identity": dict, "config": dict, "windows": int, "epochs": int, "stream": list}
_COMMIT_FIELDS = {"parts": dict, "source": dict, "numerics": dict, "report": dict}


def numbered(index: int) -> str:
    """Name of a window's folder or commit."""
    return f"{index:05d}"


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its own digest."""
    return {**body, "self": digest_of(dict(body))}


@dataclass(frozen=True, slots=True)
class Chain:
    """A run as far as it is committed. Windows are numbered from 0; epochs of learning end to end count on after the last."""

    path: Path
    run: Mapping[str, Any]
    """Content of run.json: `identity`, `config`, the numbers of `windows` and `epochs`, the shape [N, S, D] of a `stream`."""
    commits: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, path: Path) -> "Chain":
        """The run in the folder `path`.

        Raises:
            InputError: there is none; or a record is damaged, or missing from the middle, which no crash does.
            IdentityError: it was made by another version.
        """
        run = _read_run(path)
        chain = cls(path, run, tuple(_read_commits(path / "commits", run["self"])))
        if len(chain.commits) > chain.num_commits:
            raise InputError(path / "commits", f"more records than the run has windows. {RESTORE}")
        return chain

    def extended(self, commit: Mapping[str, Any]) -> "Chain":
        """With one more commit."""
        return replace(self, commits=(*self.commits, commit))

    def moved(self, path: Path) -> "Chain":
        """In another folder."""
        return replace(self, path=path)

    def shortened(self, windows: int) -> "Chain":
        """With the first `windows` commits only."""
        return replace(self, commits=self.commits[:windows])

    @property
    def last(self) -> str:
        """Digest of the newest record."""
        return str((self.commits[-1] if self.commits else self.run)["self"])

    @property
    def num_windows(self) -> int:
        """Of the whole run."""
        return int(self.run["windows"])

    @property
    def num_commits(self) -> int:
        """Windows and epochs of the whole run."""
        return self.num_windows + int(self.run["epochs"])

    @property
    def next_window(self) -> int:
        """The first that is not committed."""
        return len(self.commits)

    @property
    def is_complete(self) -> bool:
        """Whether everything is committed."""
        return self.next_window == self.num_commits

    @property
    def numerics(self) -> Mapping[str, Any]:
        """What the newest results depend on."""
        numerics: Mapping[str, Any] = self.commits[-1]["numerics"] if self.commits else self.run["identity"]["numerics"]
        return numerics

    @property
    def source_digests(self) -> dict[str, str]:
        """SHA-256 of every tensor of the source that was read, by name."""
        return {name: sha256 for commit in self.commits for name, sha256 in commit["source"].items()}

    def parts(self, window: int) -> Path:
        """Folder of the finished shards that left with `window`, and of what is carried on."""
        return self.path / "parts" / numbered(window)

    def acts(self, window: int) -> Path:
        """Folder of the streams that `window` reads; epochs all read those that the last window left."""
        return self.path / "acts" / numbered(min(window, self.num_windows))

    @property
    def committed_acts(self) -> Mapping[str, list[list[int]]] | None:
        """Checksums of the streams that come next, as they were committed; None before the first window, which has none to go by."""
        if not self.commits:
            return None
        acts: Mapping[str, list[list[int]]] = self.commits[min(self.next_window, self.num_windows) - 1]["acts"]
        return acts

    def acts_to_keep(self) -> Set[str]:
        """Names in acts/ of what the commits left for what is not committed."""
        return {self.acts(self.next_window).name} if 0 < self.next_window < self.num_commits else set()

    def expected_parts(self) -> dict[Path, tuple[int, str]]:
        """Size and SHA-256 of every file that is still needed in parts/: of what was carried over, the newest."""
        return {
            self.parts(index) / name: (size, sha256)
            for index, commit in enumerate(self.commits)
            for name, (size, sha256) in sorted(commit["parts"].items())
            if name != CARRY or index == self.next_window - 1
        }

    def shards(self) -> list[Path]:
        """The finished shards of all blocks in order: of each the newest."""
        newest = {path.name: path for path in self.expected_parts() if path.name != CARRY}
        return list(newest.values())

    def require_parts(self) -> None:
        """Check that every file is there in its size.

        Raises:
            InputError: one is not.
        """
        for file, (size, _) in self.expected_parts().items():
            if file.is_symlink() or not file.is_file():
                raise InputError(file, f"missing, or not a regular file. {RESTORE}")
            if file.stat().st_size != size:
                raise InputError(file, f"is {file.stat().st_size} bytes, {size} were committed. {RESTORE}")

    def require_intact(self, *files: Path) -> None:
        """Check the content of files of parts/. All of it is read.

        Raises:
            InputError: one is not what was committed.
        """
        expected = self.expected_parts()
        for file in files:
            if digest_of_file(file).sha256 != expected[file][1]:
                raise InputError(file, f"is not what was committed (its SHA-256 does not match). {RESTORE}")

    def is_result(self, out: Path, *, read: bool = True) -> bool:
        """Whether `out` is what this run, all of it done, put together: its config and the very shards, or equal ones.

        Without `read` a copy of a shard is taken for it by its size.
        """
        return (out / "config.json").is_file() and all(
            self._is_copy(out / shard.name, shard, read=read) for shard in self.shards()
        )

    def _is_copy(self, file: Path, shard: Path, *, read: bool) -> bool:
        if not file.is_file():
            return False
        if shard.exists() and file.samefile(shard):
            return True
        size, sha256 = self.expected_parts()[shard]
        return digest_of_file(file).sha256 == sha256 if read else file.stat().st_size == size


def _read_run(path: Path) -> dict[str, Any]:
    file = path / "run.json"
    if not file.exists():
        raise InputError(path, "no cbqstream run (run.json is missing).")
    run = _read_record(file)
    try:
        made_by = int(run["identity"]["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(file, f"not a record of a run. {RESTORE}") from error
    if made_by != FORMAT:
        age = "a newer" if made_by > FORMAT else "an older"
        raise IdentityError(
            f"{path}: run format {made_by} of {age} version, this one reads {FORMAT}. Use the version that made it."
        )
    if not _is_sealed(run):
        raise InputError(file, f"checksum does not match. {RESTORE}")
    _require_fields(file, run, _RUN_FIELDS)
    return run


def _read_commits(folder: Path, before: str) -> list[dict[str, Any]]:
    if not folder.is_dir():
        raise InputError(folder, f"missing. {RESTORE}")
    commits = []
    for index, name in enumerate(sorted(entry.name for entry in folder.iterdir())):
        record = _read_record(folder / name)
        if name != numbered(index) or record.get("prev") != before or not _is_sealed(record):
            raise InputError(folder / name, f"checksum or place in the chain does not match. {RESTORE}")
        _require_fields(folder / name, record, _COMMIT_FIELDS)
        commits.append(record)
        before = record["self"]
    return commits


def _read_record(file: Path) -> dict[str, Any]:
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > _MAX_RECORD:
            raise ValueError
        record = json.loads(file.read_bytes())
        if not isinstance(record, dict):
            raise TypeError
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(file, f"not a record of a run. {RESTORE}") from error
    return record


def _require_fields(file: Path, record: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    for name, kind in fields.items():
        if not isinstance(record.get(name), kind):
            raise InputError(file, f"has no plausible {name}. {RESTORE}")


def _is_sealed(record: Mapping[str, Any]) -> bool:
    return record.get("self") == digest_of({key: value for key, value in record.items() if key != "self"})
