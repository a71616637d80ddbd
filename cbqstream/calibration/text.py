"""Documents of a dataset of text or chats, read one at a time.

The kind of a dataset is decided by the start of its content and by the suffix of its name. A file of no known kind is plain text.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

from cbqstream.calibration import readers
from cbqstream.calibration.rows import Document
from cbqstream.errors import InputError

_HEAD = 1 << 16
_GZIP = b"\x1f\x8b"
_LIST = re.compile(rb'\[\s*\{\s*"')
_TAKEN = (
    "Give text in UTF-8, JSON lines, a JSON list, CSV, TSV or parquet (each also as .gz), "
    "or token ids in .npy or .safetensors."
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of dataset: how it is recognized, and the reader of its documents."""

    read: Callable[[Path, BufferedIOBase], Iterator[Document]]
    suffixes: tuple[str, ...] = ()
    """Suffixes of file names of this kind, in lower case."""
    matches: Callable[[bytes], bool] = lambda start: False
    """Whether the start of a file shows this kind, whatever the name of the file is.

    The start is without byte order mark and blanks. If it begins with `{`, it contains the whole first line.
    """


KINDS = (
    Kind(readers.parquet, (".parquet",), lambda start: start.startswith(b"PAR1\x15")),
    Kind(readers.comma_separated, (".csv",)),
    Kind(readers.tab_separated, (".tsv",)),
    Kind(readers.json_list, (), lambda start: _LIST.match(start) is not None),
    Kind(readers.json_file, (".json",)),
    Kind(
        readers.json_lines,
        (".jsonl", ".ndjson"),
        lambda start: readers.json_object(start.partition(b"\n")[0]) is not None,
    ),
)
"""Kinds of datasets; the first that fits the suffix or the content is used, and plain text if none does."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A kind of file that is not read."""

    what: str
    suffixes: tuple[str, ...] = ()
    magic: bytes | None = None
    """Bytes by which the content shows this kind."""
    offset: int = 0
    """Place of these bytes in the file."""


REFUSED = (
    Refused("UTF-16 or UTF-32 text", (), b"\xff\xfe"),
    Refused("UTF-16 text", (), b"\xfe\xff"),
    Refused("an Arrow file", (".arrow", ".feather"), b"ARROW1\0\0"),
    Refused("a tar archive", (".tar", ".tgz"), b"ustar\0", 257),
    Refused("a tar archive", (), b"ustar  \0", 257),
    Refused("an xz file", (".xz",), b"\xfd7zXZ\0"),
    Refused("a bzip2 file", (".bz2",), b"1AY&SY", 4),
    Refused("a zstandard file", (".zst",), b"\x28\xb5\x2f\xfd"),
    Refused("a pickle, which is never read", (".pkl", ".pickle", ".pt", ".pth"), b"\x80\x04"),
    Refused("a PDF", (".pdf",), b"%PDF-"),
    Refused("a document of a word processor", (".docx", ".odt")),
    Refused("a spreadsheet", (".xls", ".xlsx", ".ods")),
    Refused("an HTML page", (".html", ".htm", ".xhtml")),
    Refused("a zip archive", (".zip", ".npz", ".epub"), b"PK\x03\x04"),
    Refused("a NumPy array, but its name does not end in .npy", (), b"\x93NUMPY"),
    Refused("a git-lfs pointer, not data (run `git lfs pull`)", (), b"version https://git-lfs"),
)
"""Kinds of files that are refused by name; the first that fits the suffix or the content is named."""


def documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a dataset in order: texts, or chats. A file of no known kind is one document of plain text.

    Raises:
        InputError: the file is missing, of a kind that is not read, not UTF-8, damaged, or a row has no document.
        UsageError: the file is parquet and pyarrow is not installed.
    """
    require_file(path)
    *_, before, last = ("", "", *path.suffixes)
    suffix = (before if last.lower() == ".gz" else last).lower()
    try:
        with _opened(path) as file:
            head = file.read(_HEAD)
            _refuse_other_kinds(path, suffix, head)
            start = head.removeprefix(readers.BOM.encode()).lstrip()
            if start.startswith(b"{") and b"\n" not in start:
                start += file.readline(readers.MAX_LINE)
            fitting = (kind.read for kind in KINDS if suffix in kind.suffixes or kind.matches(start))
            read = next(fitting, readers.plain)
            file.seek(0)
            yield from read(path, file)
    except UnicodeEncodeError as error:
        raise InputError(
            path, "holds an unpaired surrogate, which is not a valid character. Remove it from the text."
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(path, "damaged or truncated gzip data.") from error


def require_file(path: Path) -> None:
    """Refuse a path that is not a regular file.

    Raises:
        InputError: the path is missing, a folder, a pipe or a device.
    """
    if path.is_dir():
        raise InputError(path, f"a folder. {_TAKEN}")
    if not path.exists():
        raise InputError(path, "no such file.")
    if not path.is_file():
        raise InputError(
            path, f"not a regular file, but a pipe or a device. Give the .gz, or write the text to a file. {_TAKEN}"
        )


def _opened(path: Path) -> BufferedIOBase:
    """The file, opened; if its content is gzip data, decompressed as it is read."""
    with path.open("rb") as file:
        compressed = file.read(len(_GZIP)) == _GZIP
    if compressed:
        return gzip.open(path)
    if path.suffix.lower() == ".gz":
        raise InputError(path, "not gzip data. Rename or compress it.")
    return path.open("rb")


def _refuse_other_kinds(path: Path, suffix: str, head: bytes) -> None:
    for kind in REFUSED:
        if suffix in kind.suffixes or (kind.magic is not None and head.startswith(kind.magic, kind.offset)):
            raise InputError(path, f"{kind.what}. {_TAKEN}")
    if b"\0" in head and not head.startswith(b"PAR1"):
        raise InputError(path, f"a binary file, or not UTF-8 (it contains NUL bytes). {_TAKEN}")
