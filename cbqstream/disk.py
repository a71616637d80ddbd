"""All durable changes of the file system. No other module opens a file for writing, renames, links or deletes.

The rules that make a crash harmless are in `rundir/journal.py`. This module provides operations that are each either done and durable, or
not done. Operations are numbered from 1, and an observer is called before each one, so that a test can stop the program at any of them.
"""

import errno
import hashlib
import os
import resource
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cbqstream.digest import BackgroundDigest
from cbqstream.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import RawIOBase

    from _typeshed import ReadableBuffer, WriteableBuffer

Observer = Callable[[int, str, Path], None]
Activity = Literal["reading", "writing"]
Measure = Callable[[Activity], AbstractContextManager[None]]
"""Counts the time of a `with` as reading or writing, see `runtime/timings.py`."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_REMEDIES = {
    **dict.fromkeys(_FULL, "Free some space and run the same command again."),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Make the folder writable, or give another place."),
    **dict.fromkeys((errno.ENOTEMPTY, errno.EEXIST), "Something else was put there. Give another place."),
}


def unmeasured(activity: Activity) -> AbstractContextManager[None]:
    """A `Measure` that counts nothing."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size of a file in bytes, and SHA-256 of its content in hex."""

    size: int
    sha256: str


class Disk:
    """The durable operations, numbered.

    Args:
        observer: called as `observer(number, operation, path)` before each operation; an OSError that it raises counts as the operation's.
        measure: counts the time of operations.
    """

    def __init__(self, observer: Observer | None = None, measure: Measure = unmeasured) -> None:
        self._observer = observer
        self._count = 0
        self.measure = measure

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
        try:
            with self.measure("reading" if name == "read" else "writing"):
                yield
        except OSError as error:
            raise StorageError(
                f"{path}: {name} failed: {error.strerror}. {_remedy(error.errno)}", full=error.errno in _FULL
            ) from error

    def make_folder(self, path: Path, *, mode: int = 0o700) -> None:
        """Create `path`, which must not exist.

        Args:
            path: the new folder.
            mode: permissions, before the umask.
        """
        with self._operation("make_folder", path):
            path.mkdir(mode=mode)

    def write(self, path: Path, chunks: "Iterable[ReadableBuffer]", *, mode: int = 0o600) -> FileDigest:
        """Write a new file and fsync it. The file must not exist; its folder is not synced.

        Args:
            path: the new file.
            chunks: the content, in order; only one chunk at a time need be in memory.
            mode: permissions, before the umask.
        """
        with BackgroundDigest() as digest:
            size = self._write(path, chunks, mode, digest)
            return FileDigest(size, digest.hexdigest())

    def write_plain(self, path: Path, chunks: "Iterable[ReadableBuffer]") -> None:
        """Write a new file as `write` does, without a digest."""
        self._write(path, chunks, 0o600, None)

    def _write(self, path: Path, chunks: "Iterable[ReadableBuffer]", mode: int, digest: BackgroundDigest | None) -> int:
        """Write and sync a new file, and return its size in bytes."""
        size = 0
        with ExitStack() as closing:
            with self._operation("write", path):
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
                # not a file with a buffer, which would write again at the end, and replace the error by one without a name
                closing.callback(os.close, handle)
            for chunk in chunks:  # an error in making a chunk is not an error of the disk
                left = memoryview(chunk).cast("B")
                size += len(left)
                if digest is not None:
                    digest.update(left)
                with self._step("write", path):
                    while left:
                        left = left[os.write(handle, left) :]
                if digest is not None:
                    digest.wait()  # the next chunk may use the same memory
            with self._operation("sync_file", path):  # on the handle that wrote: another one may not report an error
                os.fsync(handle)
        return size

    @contextmanager
    def written_by_a_library(self, path: Path) -> "Iterator[None]":
        """Let a library write a file inside a `with`, under a name that nothing refers to yet; the file is synced at the end."""
        with self._operation("write", path):
            yield
        with self._operation("sync_file", path):
            _fsync(path, 0)

    def replace(self, path: Path, chunks: "Iterable[ReadableBuffer]") -> None:
        """Write a file that need not outlive the process. A reader sees the old content or the new content, never a part."""
        with self._operation("replace", path):
            beside = path.with_name(f"{path.name}.new")
            handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.writelines(chunks)
            beside.replace(path)

    @contextmanager
    def scratch(self, path: Path) -> "Iterator[ScratchFile]":
        """An unlinked temporary file inside a `with`, in which pieces are written and read again; it is freed even after a crash."""
        with self._operation("scratch", path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            path.unlink()
        try:
            yield ScratchFile(handle, lambda name: self._step(name, path))
        finally:
            os.close(handle)

    def sync_folder(self, path: Path) -> None:
        """fsync the entries of a folder: files that were created, renamed or linked in it are durable afterwards."""
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
        """Make `target` a hard link to `source`, or a durable copy if the file system has no hard links."""
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
        """Delete a file if it exists. Not synced: nothing refers to the file any more."""
        with self._operation("remove_file", path):
            path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Delete a folder with everything in it, or a file, if it exists. Not synced: nothing refers to it any more."""
        with self._operation("remove_tree", path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


class ScratchFile:
    """A temporary file with pieces of bytes. Made by `Disk.scratch`."""

    def __init__(self, handle: int, step: "Callable[[str], AbstractContextManager[None]]") -> None:
        self._handle = handle
        self._step = step
        self._size = 0
        self.reads = 0
        """Number of pieces that were read so far."""

    def append(self, content: "ReadableBuffer") -> int:
        """Write a new piece, and return its offset."""
        start = self._size
        self._size += memoryview(content).nbytes
        self.write(start, content)
        return start

    def reserve(self, size: int) -> int:
        """Make room for a piece of `size` bytes, all zero, and return its offset."""
        start = self._size
        self._size += size
        with self._step("write"):
            os.truncate(self._handle, self._size)
        return start

    def write(self, start: int, content: "ReadableBuffer") -> None:
        """Overwrite the bytes at offset `start`."""
        left = memoryview(content).cast("B")
        with self._step("write"):
            while left:
                written = os.pwrite(self._handle, left, start)
                start, left = start + written, left[written:]

    def read(self, start: int, into: "WriteableBuffer") -> None:
        """Fill a buffer with the bytes at offset `start`."""
        self.reads += 1
        left = memoryview(into).cast("B")
        with self._step("read"):
            while left:
                read = os.preadv(self._handle, [left], start)
                if not read:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                start, left = start + read, left[read:]

    def sync(self) -> None:
        """Wait until everything that was written is on the disk."""
        with self._step("sync_file"):
            os.fsync(self._handle)

    def drop_cache(self) -> None:
        """Have the next reads come from the disk and not from the page cache. What was written must be synced.

        Raises:
            StorageError: the system has no call for that.
        """
        with self._step("read"):
            drop_cache(self._handle)


def drop_cache(handle: int, start: int = 0, length: int = 0) -> None:
    """Drop a part of an open file from the page cache, so that it is read from the disk the next time.

    Args:
        handle: file descriptor.
        start: offset of the first byte.
        length: number of bytes; 0 means all up to the end.

    Raises:
        OSError: the system has no call for that.
    """
    if not hasattr(os, "posix_fadvise"):
        raise OSError(errno.ENOTSUP, "the page cache cannot be dropped on this system")
    os.posix_fadvise(handle, start, length, os.POSIX_FADV_DONTNEED)


def _remedy(number: int | None) -> str:
    """A sentence about what to do after an error of the operating system."""
    if number != errno.EFBIG:
        return _REMEDIES.get(number or 0, "Check the file system.")
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == resource.RLIM_INFINITY:
        return "The file system takes no file of this size. Use another one."
    return f"A file may have {limit:,} bytes (ulimit -f). Raise the limit and run the same command again."


def digest_of_file(path: Path) -> FileDigest:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return FileDigest(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def is_occupied(out: Path) -> bool:
    """Whether `out` is a file, or a folder that is not empty."""
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def free_bytes(folder: Path) -> int:
    """Bytes that this user can still write on the file system of `folder`."""
    return shutil.disk_usage(folder).free


def open_log(path: Path) -> "RawIOBase":
    """An unbuffered file to which lines are appended, for people and other programs; never read back, never synced."""
    return path.open("ab", buffering=0)


def _fsync(path: Path, flag: int) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
