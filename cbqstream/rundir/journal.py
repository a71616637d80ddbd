"""The run directory as it is written: a chain of commits, one per window.

    RUN/LOCK  run.json  commits/00000 ...  parts/00000/{block-*.safetensors, state.safetensors}  acts/00001/{reference, quantized}  tmp/

What no commit names does not exist; nothing is overwritten; parts are truth, activations are cache. A window is built in tmp/, made
durable, checked, renamed into place, and only then named by a commit, which is itself a rename. So a process that is killed at any point
leaves the state before the window or the state after it. What is left over is deleted at the next start, under the lock.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cbqstream.disk import Disk, FileDigest
from cbqstream.errors import IdentityError, InputError, StoppedError, StorageError, UsageError
from cbqstream.records import EpochReport, Numerics, WindowReport
from cbqstream.rundir.chain import BESIDE, RESTORE, STATES_KEPT, WINDOW_STATE, Chain, is_run, numbered, require_run
from cbqstream.rundir.identity import canonical
from cbqstream.rundir.partial import PARTIAL, PartialResults, facts_inside
from cbqstream.rundir.records import Checksums, Commit, RunRecord

_FOLDERS = ("commits", "parts", "acts", "tmp")
_ROLLBACK = "ROLLBACK"
"""While this file exists, the commits from the one that it names on are being deleted."""


class Journal:
    """A run directory that changes. Made by `open_journal`, with the lock held."""

    def __init__(self, chain: Chain, disk: Disk) -> None:
        self.chain = chain
        self.disk = disk

    @property
    def building(self) -> Path:
        """Folder in which the next window is built: it has the folders `parts` and `acts`."""
        return self.chain.path / "tmp"

    def new_folder(self, name: str) -> None:
        """Make the folder `name` in tmp/."""
        self.disk.make_folder(self.building / name)

    def empty_tmp(self) -> None:
        """Delete what is in tmp/, before a window is built."""
        self.disk.remove_tree(self.building)
        self.disk.make_folder(self.building)

    def partial_results(self, numerics: Numerics) -> PartialResults:
        """The results inside the next window, for some numerics."""
        return PartialResults(self.chain.path / PARTIAL, self.building, self.disk, self.chain.last, numerics)

    def _drop_partial_results(self) -> None:
        if (self.chain.path / PARTIAL).exists():
            self.disk.remove_tree(self.chain.path / PARTIAL)

    def drop_beside(self) -> None:
        """Delete the values that blocks read with both streams. Every process computes them again."""
        if (self.chain.path / BESIDE).exists():
            self.disk.remove_tree(self.chain.path / BESIDE)

    def clean(self) -> None:
        """Delete what no commit names: the remains of a process that was stopped.

        Raises:
            InputError: a file that is not of a run is in the way.
        """
        self.empty_tmp()
        self.drop_beside()
        if not facts_inside(
            self.chain.path, self.chain.last
        ):  # they belong to a window that is committed or rolled back
            self._drop_partial_results()
        keep = {
            "parts": {numbered(index) for index in range(self.chain.next_window)},
            "acts": self.chain.acts_to_keep(),
        }
        for folder, names in keep.items():
            if not (self.chain.path / folder).exists():  # deleted by a user
                self.disk.make_folder(self.chain.path / folder)
            for entry in sorted((self.chain.path / folder).iterdir()):
                if not entry.name.isdigit():
                    raise InputError(entry, "does not belong in a run directory. Move it away.")
                if entry.name not in names:
                    self.disk.remove_tree(entry)
        self._drop_old_states()

    def _drop_old_states(self) -> None:
        for window in range(self.chain.next_window - 1 - STATES_KEPT, -1, -1):
            if not (self.chain.parts(window) / WINDOW_STATE).exists():
                return
            self.disk.remove_file(self.chain.parts(window) / WINDOW_STATE)

    def publish_acts(self, place: Path, *, durable: bool = True) -> None:
        """Rename `tmp/acts` to `place`. Streams that no commit will name need not be durable: after a crash they are deleted."""
        if durable:
            self.disk.sync_folders(self.building / "acts")
        self.disk.rename(self.building / "acts", place)
        if durable:
            self.disk.sync_folder(place.parent)

    def commit(
        self,
        *,
        parts: Mapping[str, FileDigest],
        acts: Mapping[str, Checksums] | None,
        source: Mapping[str, str],
        numerics: Numerics,
        report: WindowReport | EpochReport,
    ) -> None:
        """Make what was built in tmp/ part of the run, as its next window.

        Args:
            parts: digest of each file in tmp/parts.
            acts: checksums of the streams in tmp/acts; None if what follows reads the streams that are there already.
            source: SHA-256 of each tensor of the source that was read for the first time, by name.
            numerics: numerics of the results.
            report: result and costs of the window.

        Raises:
            InputError: a file has another size than was written.
            StorageError: the disk refused an operation.
        """
        window, before = self.chain.next_window, self.chain
        record = Commit(
            window=window, prev=before.last, parts=parts, acts=acts, source=source, numerics=numerics, report=report
        )
        self.disk.sync_folders(self.building / "parts")
        self._require_written(parts)
        self.disk.rename(self.building / "parts", before.parts(window))
        self.disk.sync_folder(before.path / "parts")
        if acts is not None:
            self.publish_acts(before.acts(window + 1))
        _publish(self.disk, self.building / "commit", before.path / "commits" / numbered(window), record.to_dict())
        self.chain = before.extended(record)
        self._drop_partial_results()
        if before.acts(window).name not in self.chain.acts_to_keep():
            self.disk.remove_tree(before.acts(window))
        self._drop_old_states()

    def roll_back(self, windows: int) -> None:
        """Delete all but the first `windows` windows.

        Raises:
            UsageError: the run has no more windows than that, or the state that the next window needs is no longer kept.
        """
        chain = self.chain
        if not 0 <= windows < chain.next_window:
            raise UsageError(f"{chain.path}: {chain.next_window} windows are done, so --to must be smaller than that.")
        needs_state = windows > 0 and WINDOW_STATE in chain.commits[windows - 1].parts
        if needs_state and not (chain.parts(windows - 1) / WINDOW_STATE).exists():
            raise UsageError(
                f"{chain.path}: the state of window {windows} is no longer kept. Only the newest window can be rolled back, or all: --to 0."
            )
        chain.shortened(windows).require_parts()
        _publish(self.disk, self.building / _ROLLBACK, chain.path / _ROLLBACK, {"windows": windows})
        _finish_rollback(chain.path, self.disk)
        self.chain = Chain.read(chain.path)
        self._drop_partial_results()
        self.clean()

    def _require_written(self, parts: Mapping[str, FileDigest]) -> None:
        for name, digest in parts.items():
            found = (self.building / "parts" / name).stat().st_size
            if found != digest.size:
                raise InputError(self.building / "parts" / name, f"is {found} bytes after writing {digest.size}.")


@contextmanager
def open_journal(
    path: Path, disk: Disk, run: RunRecord | None = None, *, shared: bool = False, whole: bool = True
) -> Iterator[Journal]:
    """The journal of a run, locked inside the `with`. At its end tmp/ is emptied, so that a full disk is not left full.

    Args:
        path: the run directory.
        disk: does the writing.
        run: record of a new run; not compared with a run that is there already. None: the run must exist.
        shared: the folder may belong to another user, or be writable by others.
        whole: every file of parts/ must be present.

    Raises:
        StoppedError: another process holds the run.
        UsageError: the folder is not empty and not a run.
        InputError: a record is damaged, or a file is missing or has another size.
        IdentityError: another user could have changed the run.
        StorageError: the file system has no locks.
    """
    disk.remove_tree(_deleted(path))
    if run is not None:
        _make_run_folder(path, disk)
    else:
        require_run(path)
    if not shared:
        _require_private(path)
    with _locked(path):
        if run is not None and not is_run(path):
            _begin(path, disk, run)
        _finish_rollback(path, disk)
        chain = Chain.read(path)
        if whole:
            chain.require_parts()
        journal = Journal(chain, disk)
        journal.clean()
        try:
            yield journal
        finally:
            with suppress(StorageError):  # an earlier error matters more
                journal.empty_tmp()
                journal.drop_beside()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path / "LOCK", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise StoppedError(f"{path}: another process is working on this run. Wait for it, or stop it.") from error
    except (NotImplementedError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else "not implemented"
        raise StorageError(
            f"{path}: cannot be locked: {why}. Use a --run-dir on a file system that has locks."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _begin(path: Path, disk: Disk, run: RunRecord) -> None:
    disk.sync_folder(path)  # LOCK first: a folder with our subfolders and no lock belongs to somebody else
    for folder in _FOLDERS:
        disk.remove_tree(path / folder)
        disk.make_folder(path / folder)
    disk.sync_folder(path)  # then the folders: a run has all of them
    _publish(disk, path / "tmp" / "run.json", path / "run.json", run.to_dict())


def _publish(disk: Disk, pending: Path, file: Path, record: Mapping[str, Any]) -> None:
    """Write a record durably as `pending`, and rename it to `file`. A crash leaves all of it or nothing."""
    disk.write(pending, [canonical(record)])
    disk.rename(pending, file)
    disk.sync_folder(file.parent)


def _finish_rollback(path: Path, disk: Disk) -> None:
    marker = path / _ROLLBACK
    if not marker.exists():
        return
    try:
        windows = int(json.loads(marker.read_bytes())["windows"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(marker, f"damaged. {RESTORE}") from error
    for record in sorted((path / "commits").iterdir(), reverse=True):
        if record.name >= numbered(windows):
            disk.remove_file(record)
    disk.sync_folder(path / "commits")
    disk.remove_file(marker)
    disk.sync_folder(path)


def discard(path: Path, disk: Disk, *, shared: bool = False) -> None:
    """Delete a run directory. One rename makes it invalid, whatever happens after that.

    Raises:
        UsageError: a file in it does not belong to the run.
        CbqstreamError: see `open_journal`.
    """
    with open_journal(path, disk, shared=shared, whole=False) as journal:
        for entry in sorted(path.iterdir()):
            if entry.name not in ("LOCK", "run.json", BESIDE, PARTIAL, *_FOLDERS):
                raise UsageError(f"{entry}: does not belong to the run. Move it away first.")
        disk.rename(path, _deleted(path))
        disk.sync_folder(path.parent)
        journal.chain = journal.chain.moved(_deleted(path))
    disk.remove_tree(_deleted(path))


def _deleted(path: Path) -> Path:
    """Name of a run directory while it is deleted. It belongs to this program."""
    return path.with_name(path.name + ".cbqstream.deleted")


def _make_run_folder(path: Path, disk: Disk) -> None:
    if not path.exists():
        try:
            disk.make_folder(path)
        except StorageError:
            if not path.is_dir():  # otherwise another process was faster, and holds the lock soon
                raise
        disk.sync_folder(path.parent)
    if not path.is_dir():
        raise UsageError(f"{path}: not a folder. Use another --run-dir.")
    names = {entry.name for entry in path.iterdir()}
    ours = "LOCK" in names and not names - {"LOCK", *_FOLDERS}
    if ours and "commits" in names and any((path / "commits").iterdir()):
        raise InputError(path, f"run.json is missing, and there are commits. {RESTORE}")
    if names and "run.json" not in names and not ours:
        raise UsageError(f"{path}: not empty and not a cbqstream run. Use another --run-dir.")


def _require_private(path: Path) -> None:
    """Refuse a run directory that other users can change, as ssh does with its keys.

    Raises:
        IdentityError: they can.
    """
    for place in (path, path / "LOCK", path / "run.json", path / "commits"):
        if not place.exists():
            continue
        status = place.stat()
        if status.st_uid != os.geteuid():
            raise IdentityError(f"{place}: belongs to another user. Use another --run-dir, or --allow-shared-run-dir.")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise IdentityError(
                f"{place}: others can write to it. Run chmod go-w on it, or use --allow-shared-run-dir."
            )
