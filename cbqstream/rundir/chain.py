"""A run directory, read and checked: run.json, and the chain of commits that depends on it. Nothing here writes."""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cbqstream.disk import FileDigest, digest_of_file
from cbqstream.errors import IdentityError, InputError, shown
from cbqstream.records import EpochReport, Numerics, WindowReport
from cbqstream.rundir.identity import FORMAT
from cbqstream.rundir.records import Checksums, Commit, Record, RunRecord, is_sealed

WINDOW_STATE = "state.safetensors"
"""File with what the blocks that stay take into the next window, beside the shards of the blocks that left."""
REFERENCE, QUANTIZED = "reference", "quantized"
"""The two streams of hidden states: of the original model, and after the quantized prefix."""
BESIDE = "beside"
"""Folder of the values that blocks read with both streams. They depend only on the model and the tokens, so no commit names them."""
RESTORE = "Restore the run directory, or use another --run-dir."

STATES_KEPT = 2
"""Number of window states that are kept: the newest, which the next window reads, and the one before, for a rollback."""
_MAX_RECORD = 256 << 20


_Kind = TypeVar("_Kind", bound=Record)


def numbered(index: int) -> str:
    """Name of a window's folder or commit."""
    return f"{index:05d}"


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory, finished or not."""
    return (path / "run.json").exists()


def require_run(path: Path) -> None:
    """Check that a folder is a run directory.

    Raises:
        InputError: it is not.
    """
    if not is_run(path):
        raise InputError(path, "no cbqstream run (run.json is missing).")


def neither_run_nor_model(path: Path) -> InputError:
    """The error for a folder that is neither a run directory nor a model."""
    return InputError(
        path, "neither a run directory (run.json is missing) nor a model (config.json is missing). Give one of them."
    )


@dataclass(frozen=True, slots=True)
class Chain:
    """A run as far as it is committed. Windows are numbered from 0, and epochs of the end-to-end stage on after the last window."""

    path: Path
    run: RunRecord
    commits: tuple[Commit, ...]

    @classmethod
    def read(cls, path: Path) -> "Chain":
        """The run in the folder `path`.

        Raises:
            InputError: there is no run; or a record is damaged, or missing from the middle, which no crash causes.
            IdentityError: the run was made by another version.
        """
        run = _read_run(path)
        chain = cls(path, run, tuple(_read_commits(path / "commits", run.digest)))
        if len(chain.commits) > chain.num_commits:
            raise InputError(path / "commits", f"more records than the run has windows. {RESTORE}")
        return chain

    def extended(self, commit: Commit) -> "Chain":
        """The chain with one more commit."""
        return replace(self, commits=(*self.commits, commit))

    def moved(self, path: Path) -> "Chain":
        """The chain in another folder."""
        return replace(self, path=path)

    def shortened(self, windows: int) -> "Chain":
        """The chain with its first `windows` commits only."""
        return replace(self, commits=self.commits[:windows])

    @property
    def last(self) -> str:
        """Digest of the newest record."""
        return self.commits[-1].digest if self.commits else self.run.digest

    @property
    def num_windows(self) -> int:
        """Number of windows of the whole run."""
        return self.run.windows

    @property
    def num_commits(self) -> int:
        """Number of windows and epochs of the whole run."""
        return self.run.windows + self.run.epochs

    @property
    def next_window(self) -> int:
        """Number of the first window or epoch that is not committed."""
        return len(self.commits)

    @property
    def is_complete(self) -> bool:
        """Whether everything is committed."""
        return self.next_window == self.num_commits

    @property
    def numerics(self) -> Numerics:
        """The numerics of the newest results."""
        return self.commits[-1].numerics if self.commits else self.run.identity.numerics

    @property
    def reports(self) -> list[WindowReport | EpochReport]:
        """Reports of everything that is committed, in order."""
        return [commit.report for commit in self.commits]

    @property
    def window_reports(self) -> list[WindowReport]:
        """Reports of the windows that are committed."""
        return [report for report in self.reports if isinstance(report, WindowReport)]

    @property
    def epoch_reports(self) -> list[EpochReport]:
        """Reports of the epochs that are committed."""
        return [report for report in self.reports if isinstance(report, EpochReport)]

    @property
    def source_digests(self) -> dict[str, str]:
        """SHA-256 of every tensor of the source that was read, by name."""
        return {name: sha256 for commit in self.commits for name, sha256 in commit.source.items()}

    def parts(self, window: int) -> Path:
        """Folder of the finished shards that left with `window`, and of the window state."""
        return self.path / "parts" / numbered(window)

    def acts(self, window: int) -> Path:
        """Folder of the streams that `window` reads; all epochs read those that the last window left."""
        return self.path / "acts" / numbered(min(window, self.num_windows))

    @property
    def committed_acts(self) -> Mapping[str, Checksums] | None:
        """Checksums of the streams that come next, as they were committed; None before the first commit, or if there are none."""
        if not self.commits:
            return None
        return self.commits[min(self.next_window, self.num_windows) - 1].acts

    def acts_to_keep(self) -> Set[str]:
        """Names in acts/ of the streams that windows and epochs still need."""
        return {self.acts(self.next_window).name} if 0 < self.next_window < self.num_commits else set()

    def expected_parts(self) -> dict[Path, FileDigest]:
        """Digest of every file in parts/ that is still needed; of window states, the newest."""
        return {
            self.parts(index) / name: digest
            for index, commit in enumerate(self.commits)
            for name, digest in sorted(commit.parts.items())
            if name != WINDOW_STATE or index == self.next_window - 1
        }

    def shards(self) -> list[Path]:
        """The newest finished shard of every block, in the order of the blocks."""
        newest = {path.name: path for path in self.expected_parts() if path.name != WINDOW_STATE}
        return list(newest.values())

    def require_parts(self) -> None:
        """Check that every file is present and has its size.

        Raises:
            InputError: a file is missing, or has another size.
        """
        for file, digest in self.expected_parts().items():
            if file.is_symlink() or not file.is_file():
                raise InputError(file, f"missing, or not a regular file. {RESTORE}")
            if file.stat().st_size != digest.size:
                raise InputError(file, f"is {file.stat().st_size} bytes, {digest.size} were committed. {RESTORE}")

    def require_intact(self, *files: Path) -> None:
        """Check the content of files of parts/ by reading all of it.

        Raises:
            InputError: a file is not what was committed.
        """
        expected = self.expected_parts()
        for file in files:
            if digest_of_file(file).sha256 != expected[file].sha256:
                raise InputError(file, f"is not what was committed (its SHA-256 does not match). {RESTORE}")

    def is_result(self, out: Path, *, read: bool = True) -> bool:
        """Whether `out` is the result of this finished run: it has a config.json, and the same shards or equal ones.

        Args:
            out: a folder.
            read: compare the content of shards that are copies; else only their size.
        """
        return (out / "config.json").is_file() and all(
            self._is_copy(out / shard.name, shard, read=read) for shard in self.shards()
        )

    def _is_copy(self, file: Path, shard: Path, *, read: bool) -> bool:
        if not file.is_file():
            return False
        if shard.exists() and file.samefile(shard):
            return True
        expected = self.expected_parts()[shard]
        return digest_of_file(file) == expected if read else file.stat().st_size == expected.size


def _read_run(path: Path) -> RunRecord:
    require_run(path)
    file = path / "run.json"
    values = _read_record(file)
    try:
        made_by = int(values["identity"]["format"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(file, f"not a record of a run. {RESTORE}") from error
    if made_by != FORMAT:
        age = "a newer" if made_by > FORMAT else "an older"
        raise IdentityError(
            f"{path}: run format {made_by} of {age} version, this one reads {FORMAT}. Use the version that made it."
        )
    if not is_sealed(values):
        raise InputError(file, f"checksum does not match. {RESTORE}")
    return _parsed(RunRecord, file, values)


def _read_commits(folder: Path, before: str) -> list[Commit]:
    if not folder.is_dir():
        raise InputError(folder, f"missing. {RESTORE}")
    commits = []
    for index, name in enumerate(sorted(entry.name for entry in folder.iterdir())):
        values = _read_record(folder / name)
        if name != numbered(index) or values.get("prev") != before or not is_sealed(values):
            raise InputError(folder / name, f"checksum or place in the chain does not match. {RESTORE}")
        commits.append(_parsed(Commit, folder / name, values))
        before = values["self"]
    return commits


def _parsed(kind: type[_Kind], file: Path, values: Mapping[str, Any]) -> _Kind:
    """The record of a file with a valid seal.

    Raises:
        InputError: the values are not those of such a record.
    """
    try:
        record = kind.from_dict(values)
        if record.digest != values["self"]:
            raise ValueError("holds a field that is not known")
    except (ValueError, RecursionError) as error:
        raise InputError(file, f"{shown(str(error).rstrip('.'))}. {RESTORE}") from error
    return record


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
