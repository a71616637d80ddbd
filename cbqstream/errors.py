"""The exceptions of cbqstream: one class for each exit code, so a caller can tell from the class how to react.

    CbqstreamError
    +-- UsageError         2   an argument or a combination of settings cannot work
    +-- InputError        65   a given file is missing or broken, or its kind is not supported
    +-- DeviceMemoryError 69   the device has too little memory for a window
    +-- StorageError      74   a write, an fsync or a rename failed, or the disk is full
    +-- StoppedError      75   the run stopped safely, or another process is working on it; run the same command again
    +-- IdentityError     78   the run directory belongs to other inputs or settings

A message is one line that states where the error is, what is wrong and what to do. Any other exception that reaches the command line is
a bug (exit code 1).
"""

from collections.abc import Sequence
from pathlib import Path

_SHOWN = 120


def shown(text: str) -> str:
    """Text from a file, safe to print: escaped, so that it cannot control a terminal, and cut to 120 characters."""
    escaped = ascii(text)[1:-1]
    return escaped if len(escaped) <= _SHOWN else escaped[:_SHOWN] + "..."


def some_shown(names: Sequence[str], most: int) -> str:
    """At most `most` names, safe to print, and the number of the others."""
    return ", ".join(map(shown, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


class CbqstreamError(Exception):
    """Base class of all errors that cbqstream raises on purpose."""

    exit_code = 1


class UsageError(CbqstreamError):
    """An argument or a combination of settings cannot work."""

    exit_code = 2


class InputError(CbqstreamError):
    """A given file is missing or broken, or its kind is not supported.

    Args:
        place: the file or folder.
        what: what is wrong, with the numbers, as a sentence that ends with a period; then the remedy.
        tensor: name of the affected tensor, if the error is about one.
    """

    exit_code = 65

    def __init__(self, place: Path | str, what: str, *, tensor: str | None = None) -> None:
        where = str(place) if tensor is None else f'{place}: tensor "{shown(tensor)}"'
        super().__init__(f"{where}: {what}")


class DeviceMemoryError(CbqstreamError):
    """The device has too little memory for a window."""

    exit_code = 69


class StorageError(CbqstreamError):
    """A write, an fsync or a rename failed.

    Args:
        message: the message, one line.
        full: whether the reason is a full disk.
    """

    exit_code = 74

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


class StoppedError(CbqstreamError):
    """The run stopped safely, or another process is working on it; the same command resumes it."""

    exit_code = 75


class IdentityError(CbqstreamError):
    """The run directory was made from other inputs or settings, or by another version."""

    exit_code = 78
