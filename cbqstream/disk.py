"""Every durable change of the file system. No other module opens a file for writing, renames, links or deletes.

The rules that make a crash harmless are in `rundir/journal.py`; this module gives it operations that are each either done and durable or
not done. Operations are numbered from 1, and an observer is called before each one, so that a test can stop the program at any of them.
"""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cbqstream.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import RawIOBase

    from _typeshed import ReadableBuffer, WriteableBuffer

Observer = Callable[[int, str, Path], None]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_REMEDIES = {
    **dict.fromkeys(_FULL, "Free some space and run the same command again."),
    **dict.fromkeys((errno.ENOTEMPTY, errno.EEXIST), "Something else was put there. Give another place."),
}


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a file was when it was written: its size in bytes and the SHA-256 of its content, in hex."""

    size: int
    sha256: str


class Disk:
    """The durable operations, counted.

    Args:
        observer: called as `observer(number, operation, path)` before each operation; an OSError that it raises is the operation's.
    """

    def __init__(self, observer: Observer | None = None) -> None:
        self._observer = observer
        self._count = 0
        self.seconds = 0.0
        """Spent in operations so far."""
        self.reading_seconds = 0.0
        """Spent on reading scratch files again so far."""

    @contextmanager
    def _operation(self, name: str, path: Path) -> "Iterator[None]":
        self._count += 1
        with self._step(name, path):
            if self._observer is not None:
                self._observer(self._count, name, path)
            yield

    @contextmanager
    def _step(self, name: str, path: Path) -> "Iterator[None]":
        """A part of an operation, whose errors are those of the operation."""
        began = time.monotonic()
        try:
            yield
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "Check the file system.")
            raise StorageError(
                f"{path}: {name} failed: {error.strerror}. {remedy}", full=error.errno in _FULL
            ) from error
        finally:
            spent = time.monotonic() - began
            if name == "read":
                self.reading_seconds += spent
            else:
                self.seconds += spent

    def make_folder(self, path: Path) -> None:
        """Create `path`, which must not exist, with mode 0700."""
        with self._operation("make_folder", path):
            path.mkdir(mode=0o700)

    def write(self, path: Path, chunks: "Iterable[ReadableBuffer]", *, mode: int = 0o600) -> FileDigest:
        """Write a new file and fsync it. The file must not exist; its folder is not synced.

        Args:
            path: where to.
            chunks: the content, in order; only one chunk need be in memory.
            mode: permissions, before the umask.
        """
        digest, size = hashlib.sha256(), 0
        with ExitStack() as closing:
            with self._operation("write", path):
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
                file = closing.enter_context(os.fdopen(handle, "wb"))
            for chunk in chunks:  # an error in making one is not an error of the disk
                with self._step("write", path):
                    size += file.write(chunk)
                digest.update(chunk)
            with self._step("write", path):
                file.flush()
            with self._operation("sync_file", path):  # through the handle that wrote: an error may be lost on another
                os.fsync(file.fileno())
        return FileDigest(size, digest.hexdigest())

    @contextmanager
    def written_by_a_library(self, path: Path) -> "Iterator[None]":
        """For the length of a `with` a library writes a file under a name that does not count yet; then it is synced."""
        with self._operation("write", path):
            yield
        with self._operation("sync_file", path):
            _fsync(path, 0)

    def replace(self, path: Path, content: "ReadableBuffer") -> None:
        """Write a file that need not outlive the process. Who reads it meanwhile sees the old content or the new, never a part."""
        with self._operation("replace", path):
            beside = path.with_name(f"{path.name}.new")
            handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            beside.replace(path)

    @contextmanager
    def scratch(self, path: Path) -> "Iterator[ScratchFile]":
        """A file for the length of a `with`, in which pieces are written and read again. It has no name: what is left of it after a crash
        is nothing."""
        with self._operation("scratch", path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            path.unlink()
        try:
            yield ScratchFile(handle, lambda name: self._step(name, path))
        finally:
            os.close(handle)

    def sync_folder(self, path: Path) -> None:
        """fsync the entries of a folder: what was created, renamed or linked in it is durable afterwards."""
        with self._operation("sync_folder", path):
            _fsync(path, os.O_DIRECTORY)

    def sync_folders(self, path: Path) -> None:
        """fsync every folder below `path`, from the bottom up, `path` included. The files were synced when they were written."""
        for folder, subfolders, _ in os.walk(path, topdown=False):
            subfolders.sort()
            self.sync_folder(Path(folder))

    def rename(self, source: Path, target: Path) -> None:
        """Rename within one file system. `target` must not exist; neither folder is synced."""
        with self._operation("rename", target):
            if target.exists():
                raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
            source.rename(target)

    def publish(self, source: Path, target: Path) -> None:
        """Make a finished folder durable under its final name, with ordinary permissions. `target` may be an empty folder."""
        self.sync_folder(source)
        self._put(source, target)
        self.sync_folder(target.parent)

    def _put(self, source: Path, target: Path) -> None:
        with self._operation("publish", target):
            umask = os.umask(0)
            os.umask(umask)
            source.chmod(0o777 & ~umask)
            source.rename(target)  # replaces an empty folder, and no other

    def link_or_copy(self, source: Path, target: Path) -> None:
        """Make `target` the same file as `source`: a hard link, or a durable copy where the file system has none."""
        try:
            with self._operation("link", target):
                os.link(source, target)
        except StorageError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in _NO_LINKS:
                raise
            self.copy(source, target)

    def copy(self, source: Path, target: Path) -> FileDigest:
        """Copy a file byte for byte into a new file with ordinary permissions, and fsync it."""
        with source.open("rb") as file:
            return self.write(target, iter(lambda: file.read(1 << 24), b""), mode=0o666)

    def remove_file(self, path: Path) -> None:
        """Delete a file, if it is there. Not synced: what is deleted is garbage already."""
        with self._operation("remove_file", path):
            path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Delete a folder and all below it, or what else has its name, if it is there. Not synced: what is deleted is garbage already."""
        with self._operation("remove_tree", path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


class ScratchFile:
    """Pieces of bytes in a file that does not outlive the process. Made by `Disk.scratch`."""

    def __init__(self, handle: int, step: "Callable[[str], AbstractContextManager[None]]") -> None:
        self._handle = handle
        self._step = step
        self._size = 0
        self.reads = 0
        """Pieces that were read so far."""

    def append(self, content: "ReadableBuffer") -> int:
        """Write a new piece, and return where it begins."""
        start = self._size
        self._size += memoryview(content).nbytes
        self.write(start, content)
        return start

    def write(self, start: int, content: "ReadableBuffer") -> None:
        """Write over what lies at `start`."""
        left = memoryview(content).cast("B")
        with self._step("write"):
            while left:
                written = os.pwrite(self._handle, left, start)
                start, left = start + written, left[written:]

    def read(self, start: int, into: "WriteableBuffer") -> None:
        """Fill a buffer with what was written at `start`."""
        self.reads += 1
        left = memoryview(into).cast("B")
        with self._step("read"):
            while left:
                read = os.preadv(self._handle, [left], start)
                if not read:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                start, left = start + read, left[read:]


def digest_of_file(path: Path) -> FileDigest:
    """What a file is now."""
    with path.open("rb") as file:
        return FileDigest(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def free_bytes(folder: Path) -> int:
    """What this user can still write on the file system of `folder`."""
    return shutil.disk_usage(folder).free


def open_log(path: Path) -> "RawIOBase":
    """A file to which lines are added, for people and other programs; never read back, never synced. Nothing waits in a buffer."""
    return path.open("ab", buffering=0)


def _fsync(path: Path, flag: int) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
