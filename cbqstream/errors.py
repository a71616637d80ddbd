"""The exceptions of cbqstream: one class per exit code, so one class per thing a caller can do about it.

    CbqstreamError
    +-- UsageError         2   an argument or a combination of settings that cannot work
    +-- InputError        65   a file that was given is missing, broken, or not of a kind that is read
    +-- DeviceMemoryError 69   the device is too small for the window
    +-- StorageError      74   a write, an fsync or a rename failed; a full disk
    +-- StoppedError      75   stopped safely, or another process holds the run: run the same command again
    +-- IdentityError     78   the run directory belongs to other inputs or settings

Every message is one line: where, what, remedy. Any other exception that reaches the command line is a bug (exit code 1).
"""

from pathlib import Path

_SHOWN = 120


def shown(text: str) -> str:
    """`text` from a file, safe to print: escaped and cut to 120 characters, so that it cannot steer a terminal."""
    escaped = ascii(text)[1:-1]
    return escaped if len(escaped) <= _SHOWN else escaped[:_SHOWN] + "..."


class CbqstreamError(Exception):
    """Base of all errors that cbqstream raises on purpose."""

    exit_code = 1


class UsageError(CbqstreamError):
    """An argument or a combination of settings cannot work."""

    exit_code = 2


class InputError(CbqstreamError):
    """A file that was given is missing, broken, or not of a kind that is read.

    Args:
        place: the file or folder.
        what: what is wrong, with the numbers, ending in a full stop; then the remedy.
        tensor: the tensor concerned, if one is.
    """

    exit_code = 65

    def __init__(self, place: Path | str, what: str, *, tensor: str | None = None) -> None:
        where = str(place) if tensor is None else f'{place}: tensor "{shown(tensor)}"'
        super().__init__(f"{where}: {what}")


class DeviceMemoryError(CbqstreamError):
    """The device has too little memory for a window."""

    exit_code = 69


class StorageError(CbqstreamError):
    """The file system refused a write, an fsync or a rename.

    Args:
        message: the line.
        full: whether it was for lack of room.
    """

    exit_code = 74

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


class StoppedError(CbqstreamError):
    """The run stopped safely, or another process holds it; the same command continues it."""

    exit_code = 75


class IdentityError(CbqstreamError):
    """The run directory was made from other inputs or settings, or by another version."""

    exit_code = 78
