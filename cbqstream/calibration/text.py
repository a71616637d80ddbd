"""Documents of a plain text, jsonl or parquet file, read one at a time.

In jsonl and parquet files, the field `text` of each row is a document.
"""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

from cbqstream.errors import InputError, UsageError

_FIELD = "text"
_PARQUET_ROWS = 256
_MAX_PLAIN = 1 << 30
_MAX_LINE = 1 << 26


def documents(path: Path) -> Iterator[str]:
    """Yield the documents of a file in order; a file that is not .jsonl or .parquet is one document of plain text.

    Raises:
        InputError: the file is missing, not UTF-8, not jsonl or parquet, or has no field `text`.
        UsageError: the file is parquet and pyarrow is not installed.
    """
    if not path.is_file():
        raise InputError(path, "no such file." if not path.is_dir() else "a folder. Give a file of text.")
    reader = {".jsonl": _jsonl, ".parquet": _parquet}.get(path.suffix.lower(), _plain)
    try:
        yield from reader(path)
    except UnicodeEncodeError as error:
        raise InputError(
            path, "holds an unpaired surrogate, which is not a valid character. Remove it from the text."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(path, f"not UTF-8 text (byte {error.start}).") from error


def _plain(path: Path) -> Iterator[str]:
    if path.stat().st_size > _MAX_PLAIN:
        raise InputError(
            path,
            f"larger than {_MAX_PLAIN >> 20} MiB, and plain text is read as a whole. Give a part of it, or a .jsonl file.",
        )
    yield path.read_text(encoding="utf-8")


def _jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), ""), 1):
            if len(line) == _MAX_LINE:
                raise InputError(path, f"line {number} is longer than {_MAX_LINE:,} characters.")
            if not line.strip():
                continue
            try:
                text = json.loads(line)[_FIELD]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise InputError(path, f'line {number} is not a JSON object with a field "{_FIELD}".') from error
            if not isinstance(text, str):
                raise InputError(path, f'line {number}: "{_FIELD}" is not a string.')
            text.encode()  # raises UnicodeEncodeError: JSON escapes can contain unpaired surrogates, which UTF-8 cannot encode
            yield text


def _parquet(path: Path) -> Iterator[str]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UsageError("parquet needs pyarrow. Run: pip install 'cbqstream[eval]'") from error
    try:
        table = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise InputError(path, "not a parquet file.") from error
    if _FIELD not in table.schema_arrow.names:
        raise InputError(path, f'no column "{_FIELD}" (columns: {", ".join(table.schema_arrow.names)}).')
    if str(table.schema_arrow.field(_FIELD).type) not in ("string", "large_string", "string_view"):
        raise InputError(path, f'column "{_FIELD}" holds {table.schema_arrow.field(_FIELD).type}, not strings.')
    batches = table.iter_batches(batch_size=_PARQUET_ROWS, columns=[_FIELD])
    while True:
        try:
            texts = next(batches).column(0).to_pylist()
        except StopIteration:
            return
        except (OSError, ValueError) as error:
            raise InputError(path, "damaged parquet data.") from error
        yield from (text for text in texts if text)
