"""The run directory: a chain of commits, one per window.

    RUN/LOCK  run.json  commits/00000 ...  parts/00000/{block-*.safetensors, carry.safetensors}  acts/00001/{reference, quantized}  tmp/

What no commit names does not exist; nothing is overwritten; parts are truth, activations are cache. A window is built in tmp/, made
durable, checked, renamed into place, and only then named by a commit, which is itself a rename. So a process that is killed anywhere
leaves the state before the window or the state after it, and what is left lying is deleted at the next start, under the lock.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cbqstream.disk import Disk, FileDigest
from cbqstream.errors import IdentityError, InputError, StoppedError, UsageError
from cbqstream.run.identity import FORMAT, canonical, digest_of

CARRY = "carry.safetensors"
"""What the blocks that stay in the next window carry over; beside the shards of those that left."""
REFERENCE, QUANTIZED = "reference", "quantized"
"""The two streams of hidden states: of the original model, and of the one that is being made."""

_FOLDERS = ("commits", "parts", "acts", "tmp")


def numbered(index: int) -> str:
    """Name of a window's folder or commit."""
    return f"{index:05d}"


class Journal:
    """The state of a run on disk. `open_journal` gives it, with the lock held."""

    def __init__(self, path: Path, disk: Disk, num_windows: int, num_epochs: int) -> None:
        self.path = path
        self.disk = disk
        self.commits = read_commits(path)
        self._num_windows, self._num_commits = num_windows, num_windows + num_epochs

    @property
    def next_window(self) -> int:
        """First window that is not committed; epochs of learning end to end count on after the last."""
        return len(self.commits)

    @property
    def is_complete(self) -> bool:
        """Whether everything is committed."""
        return self.next_window == self._num_commits

    @property
    def building(self) -> Path:
        """Where the next window is built: it has the folders `parts` and `acts`."""
        return self.path / "tmp"

    def new_folder(self, name: str) -> None:
        """Make the folder `name` in tmp/."""
        self.disk.make_folder(self.building / name)

    def parts(self, window: int) -> Path:
        """Folder of the finished shards that left with `window`, and of what is carried on."""
        return self.path / "parts" / numbered(window)

    @property
    def waiting_acts(self) -> Path:
        """Folder of the streams that the next window, or every epoch, reads."""
        return self._acts(self.next_window)

    @property
    def committed_acts(self) -> dict[str, list[list[int]]] | None:
        """Checksums of those streams as they were committed; None before the first window, which has none to go by."""
        if not self.commits:
            return None
        acts: dict[str, list[list[int]]] = self.commits[min(self.next_window, self._num_windows) - 1]["acts"]
        return acts

    def _acts(self, window: int) -> Path:
        return self.path / "acts" / numbered(min(window, self._num_windows))

    def shards(self) -> list[Path]:
        """The finished shards of all blocks in order: of each the newest."""
        newest = {
            name: self.parts(index) / name
            for index, commit in enumerate(self.commits)
            for name in sorted(commit["parts"])
            if name.startswith("block-")
        }
        return list(newest.values())

    def is_result(self, out: Path) -> bool:
        """Whether `out` is what this run, all of whose windows are done, put together: its config and the very shards."""
        shards = self.shards()
        sizes = {name: size for commit in self.commits for name, (size, _) in commit["parts"].items()}
        return (out / "config.json").is_file() and all(
            (out / shard.name).is_file() and (out / shard.name).stat().st_size == sizes[shard.name] for shard in shards
        )

    def empty_tmp(self) -> None:
        """Start to build a window."""
        self.disk.remove_tree(self.building)
        self.disk.make_folder(self.building)

    def clean(self) -> None:
        """Delete what no commit names: the remains of a process that was stopped."""
        self.empty_tmp()
        keep = {"parts": {numbered(index) for index in range(self.next_window)}, "acts": self._acts_to_keep()}
        for folder, names in keep.items():
            for entry in sorted((self.path / folder).iterdir()):
                if entry.name not in names:
                    self.disk.remove_tree(entry)
        self._drop_old_carry()

    def _acts_to_keep(self) -> set[str]:
        """Streams that what is committed left for what is not. Epochs all read those that the last window left."""
        if not 0 < self.next_window < self._num_commits:
            return set()
        return {self.waiting_acts.name}

    def _drop_old_carry(self) -> None:
        """Only the newest window's carry is ever read again; all of them would be as large as the model."""
        for window in range(self.next_window - 2, -1, -1):
            if not (self.parts(window) / CARRY).exists():
                return
            self.disk.remove_file(self.parts(window) / CARRY)

    def publish_acts(self, place: Path) -> None:
        """Make `tmp/acts` durable as `place`."""
        self.disk.sync_folders(self.building / "acts")
        self.disk.rename(self.building / "acts", place)
        self.disk.sync_folder(place.parent)

    def commit(
        self,
        window: int,
        *,
        parts: dict[str, FileDigest],
        acts: dict[str, list[list[int]]] | None,
        report: dict[str, Any],
    ) -> None:
        """Make a window that was built in tmp/ part of the run.

        Args:
            window: its number, the next one.
            parts: digest of each file in tmp/parts.
            acts: size and crc32c of each chunk in tmp/acts by stream; None where nothing follows that needs other ones.
            report: what is told about it.
        """
        previous = self.commits[-1]["self"] if self.commits else None
        table = {name: [digest.size, digest.sha256] for name, digest in parts.items()}
        body = {"format": FORMAT, "window": window, "prev": previous, "parts": table, "acts": acts, "report": report}
        record = {**body, "self": digest_of(body)}
        self.disk.sync_folders(self.building / "parts")
        self._require_written(parts)
        self.disk.rename(self.building / "parts", self.parts(window))
        self.disk.sync_folder(self.path / "parts")
        if acts is not None:
            self.publish_acts(self._acts(window + 1))
        pending = self.building / "commit"
        self.disk.write(pending, [canonical(record)])
        self.disk.rename(pending, self.path / "commits" / numbered(window))
        self.disk.sync_folder(self.path / "commits")
        self.commits.append(record)
        if self._acts(window).name not in self._acts_to_keep():
            self.disk.remove_tree(self._acts(window))
        self._drop_old_carry()

    def _require_written(self, parts: dict[str, FileDigest]) -> None:
        for name, digest in parts.items():
            found = (self.building / "parts" / name).stat().st_size
            if found != digest.size:
                raise InputError(self.building / "parts" / name, f"is {found} bytes after writing {digest.size}.")


@contextmanager
def open_journal(path: Path, run: dict[str, Any], disk: Disk) -> Iterator[Journal]:
    """The journal of a run, made if it is not there, locked for the length of the `with`.

    Args:
        path: the run directory.
        run: content of run.json for a new run, see `read_run`. Not compared with what is there.
        disk: does the writing.

    Raises:
        StoppedError: another process holds it.
        UsageError: the folder is not empty and not a run.
        InputError: a commit is damaged.
    """
    _make_run_folder(path, disk)
    lock = FileLock(path / "LOCK", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise StoppedError(f"{path}: another process is working on this run. Wait for it, or stop it.") from error
    try:
        if not (path / "run.json").exists():
            for folder in _FOLDERS:
                disk.remove_tree(path / folder)
                disk.make_folder(path / folder)
            pending = path / "tmp" / "run.json"
            disk.write(pending, [json.dumps(run, indent=2).encode()])
            disk.rename(pending, path / "run.json")
            disk.sync_folder(path)
        content = read_run(path)
        journal = Journal(path, disk, content["windows"], content["epochs"])
        journal.clean()
        yield journal
    finally:
        lock.release()


def _make_run_folder(path: Path, disk: Disk) -> None:
    if not path.exists():
        disk.make_folder(path)
        disk.sync_folder(path.parent)
        return
    if not path.is_dir():
        raise UsageError(f"{path}: not a folder. Use another --run-dir.")
    names = {entry.name for entry in path.iterdir()}
    interrupted_start = "LOCK" in names and not names - {"LOCK", *_FOLDERS}
    if names and "run.json" not in names and not interrupted_start:
        raise UsageError(f"{path}: not empty and not a cbqstream run. Use another --run-dir.")


def read_run(path: Path) -> dict[str, Any]:
    """Content of run.json: `identity`, `config`, and how many `windows` and `epochs` of learning end to end it has. Reads only.

    Raises:
        InputError: there is no run, or it is damaged.
        IdentityError: it was made by a newer version.
    """
    file = path / "run.json"
    if not file.is_file():
        raise InputError(path, "no cbqstream run (run.json is missing).")
    try:
        run = json.loads(file.read_text())
        made_by = run["identity"]["format"]
        run["config"]["out"], int(run["windows"]), int(run["epochs"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(file, "damaged.") from error
    if made_by != FORMAT:
        raise IdentityError(f"{path}: run format {made_by}, this version reads {FORMAT}. Use the version that made it.")
    return dict(run)


def read_commits(path: Path) -> list[dict[str, Any]]:
    """The unbroken chain of commits. Reads only.

    Raises:
        InputError: a record is damaged or missing from the middle; no crash does that.
    """
    folder = path / "commits"
    names: Sequence[str] = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    commits: list[dict[str, Any]] = []
    for index, name in enumerate(names):
        file = folder / name
        try:
            record = json.loads(file.read_text())
            claimed = record.pop("self")
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(file, "not a commit record.") from error
        if (
            name != numbered(index)
            or claimed != digest_of(record)
            or record["prev"] != (commits[-1]["self"] if commits else None)
        ):
            raise InputError(
                file,
                "checksum or place in the chain does not match. Restore the run directory, or use another --run-dir.",
            )
        commits.append({**record, "self": claimed})
    return commits
