"""SHA-256 of data that is read or written in pieces, computed on a thread beside the reading or writing."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_LARGE = 1 << 20
"""Bytes from which a piece is worth a thread."""


class BackgroundDigest:
    """A SHA-256 that is used in a `with`. A thread computes it for large pieces, since hashlib releases the interpreter for them.

    A piece must not change until the next call of a method.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def update(self, piece: "ReadableBuffer") -> None:
        """Add a piece."""
        self.wait()
        if memoryview(piece).nbytes < _LARGE:
            self._digest.update(piece)
            return
        self._pool = self._pool or ThreadPoolExecutor(max_workers=1, thread_name_prefix="digest")
        self._running = self._pool.submit(self._digest.update, piece)

    def wait(self) -> None:
        """Wait until the last piece is no longer used."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def hexdigest(self) -> str:
        """Digest in hex of the pieces so far."""
        self.wait()
        return self._digest.hexdigest()
