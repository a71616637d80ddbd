"""Readers of the kinds of datasets: each yields the documents of an open file in order, and keeps little of it in memory."""

import codecs
import csv
import importlib
import json
import re
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from cbqstream.calibration.rows import FIELDS, TEXT, Document, document, field_of, listed
from cbqstream.errors import InputError, UsageError, shown

BOM = "\ufeff"
"""Byte order mark. In UTF-8 it only says that the text is UTF-8; it is not part of the text."""
MAX_LINE = 1 << 26
"""Largest size of a line or of an entry of a list, in bytes or characters."""
_MAX_PLAIN = 1 << 30
_MAX_OBJECT = 1 << 28
_CHUNK = 1 << 20
_PARQUET_ROWS = 256
_BLANK = re.compile(r"[ \t\n\r]*")


def plain(path: Path, file: BufferedIOBase) -> Iterator[Document]:
    """One document: the whole file.

    Raises:
        InputError: the file is too large or not UTF-8.
    """
    yield _whole(path, file, _MAX_PLAIN, "plain text is read as a whole. Give a part of it, or a .jsonl file.")


def json_lines(path: Path, file: BufferedIOBase) -> Iterator[Document]:
    """Documents of a file with one JSON object per line.

    Raises:
        InputError: a line is too long, not UTF-8, not a JSON object, or has no document.
    """
    for number, line in _lines(path, file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(path, f'line {number} is not a JSON object with a field "{TEXT}".') from error
        yield document(path, f"line {number}", row)


def json_list(path: Path, file: BufferedIOBase) -> Iterator[Document]:
    """Documents of a file that is one JSON list of objects.

    Raises:
        InputError: the file is not UTF-8 or not a JSON list, or an entry has no document.
    """
    for number, row in enumerate(_entries(path, file), 1):
        yield document(path, f"entry {number}", row)


def json_file(path: Path, file: BufferedIOBase) -> Iterator[Document]:
    """Documents of a .json file: a list of objects, one object per line, or one object that holds them.

    Raises:
        InputError: the file is not UTF-8 or none of these, or a row has no document.
    """
    first, others = b"", False
    for line in iter(lambda: file.readline(MAX_LINE), b""):
        line = line.removeprefix(BOM.encode()).strip()
        others = bool(first and line)
        first = first or line
        if others:
            break
    file.seek(0)
    row = json_object(first)
    rows = row is not None and (others or any(name in row for name in FIELDS))
    yield from (json_list if first.startswith(b"[") else json_lines if rows else _json_table)(path, file)


def json_object(line: bytes) -> dict[str, Any] | None:
    """Content of a line that is a JSON object in UTF-8; None for other lines."""
    if not line.startswith(b"{"):
        return None
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def comma_separated(path: Path, file: BufferedIOBase) -> Iterator[Document]:
    """Documents of a table with commas between columns, of which one is `text`.

    Raises:
        InputError: the file is not UTF-8 or not such a table.
    """
    yield from _csv(path, file, ",")


def tab_separated(path: Path, file: BufferedIOBase) -> Iterator[Document]:
    """Documents of a table with tabs between columns, of which one is `text`.

    Raises:
        InputError: the file is not UTF-8 or not such a table.
    """
    yield from _csv(path, file, "\t")


def parquet(path: Path, file: BufferedIOBase) -> Iterator[Document]:
    """Documents of a parquet file.

    Raises:
        InputError: the file is not parquet or is damaged, or has no column with documents.
        UsageError: pyarrow is not installed.
    """
    try:
        library = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UsageError("parquet needs pyarrow. Run: pip install 'cbqstream[eval]'") from error
    try:
        table = library.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise InputError(path, "not a parquet file.") from error
    name = field_of(path, "the table", table.schema_arrow.names, "column")
    found = str(table.schema_arrow.field(name).type)
    if name == TEXT and found not in ("string", "large_string", "string_view"):
        raise InputError(path, f'column "{TEXT}" holds {shown(found)}, not strings.')
    batches, number = table.iter_batches(batch_size=_PARQUET_ROWS, columns=[name]), 0
    while True:
        try:
            values = next(batches).column(0).to_pylist()
        except StopIteration:
            return
        except (OSError, ValueError) as error:
            raise InputError(path, "damaged parquet data.") from error
        for value in values:
            number += 1
            if value:
                yield document(path, f"row {number}", {name: value})


def _whole(path: Path, file: BufferedIOBase, limit: int, remedy: str) -> str:
    """Text of a whole file, without a byte order mark; all lines end with a line feed."""
    if path.stat().st_size > limit or len(content := file.read(limit + 1)) > limit:
        raise InputError(path, f"larger than {limit >> 20} MiB, and {remedy}")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InputError(path, f"not UTF-8 text (byte {error.start}).") from error
    return text.removeprefix(BOM).replace("\r\n", "\n").replace("\r", "\n")


def _lines(path: Path, file: BufferedIOBase) -> Iterator[tuple[int, str]]:
    """Lines of a file with their ends and their numbers from 1."""
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
        if len(line) == MAX_LINE:
            raise InputError(path, f"line {number} is longer than {MAX_LINE:,} bytes.")
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise InputError(path, f"line {number} is not UTF-8 text.") from error
        yield number, text.removeprefix(BOM) if number == 1 else text


def _entries(path: Path, file: BufferedIOBase) -> Iterator[Any]:
    """Values of a JSON list, of which one is in memory at a time.

    A value is complete where the text after it is known: at a comma or at the end of the list.
    """
    stream, decoder = codecs.getreader("utf-8-sig")(file), json.JSONDecoder()
    text, number = _more(path, stream, _CHUNK, 1).lstrip(), 1
    at = len("[")
    while True:
        begin = _end_of_blanks(text, at)
        if number == 1 and text.startswith("]", begin):
            return
        try:
            value, end = decoder.raw_decode(text, begin)
            end = _end_of_blanks(text, end)
        except (ValueError, RecursionError):
            end = len(text)
        if end == len(text):
            more = "" if end - at > MAX_LINE else _more(path, stream, max(_CHUNK, end - at), number)
            if not more:
                raise InputError(
                    path, f"entry {number} of the list is not complete JSON of at most {MAX_LINE:,} characters."
                )
            text, at = text[at:] + more, 0
            continue
        yield value
        if text[end] == "]":
            if (text[end + 1 :] + _more(path, stream, _CHUNK, number)).strip():
                raise InputError(path, "goes on after the end of the JSON list. Give JSON lines, or one list.")
            return
        if text[end] != ",":
            raise InputError(path, f"no comma after entry {number} of the list.")
        at, number = end + 1, number + 1


def _end_of_blanks(text: str, at: int) -> int:
    blanks = _BLANK.match(text, at)
    return at if blanks is None else blanks.end()


def _more(path: Path, stream: codecs.StreamReader, size: int, number: int) -> str:
    try:
        return stream.read(size)
    except UnicodeDecodeError as error:
        raise InputError(path, f"not UTF-8 text (in entry {number} of the list, or after it).") from error


def _json_table(path: Path, file: BufferedIOBase) -> Iterator[Document]:
    """Documents of one JSON object: its own, or those of the list of objects that it holds."""
    content = _whole(path, file, _MAX_OBJECT, "a JSON object is read as a whole. Write its list as JSON lines.")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = shown(str(error))
        raise InputError(path, f"not JSON ({reason}). Give JSON lines, or one list of objects.") from error
    if not isinstance(value, dict):
        raise InputError(path, "neither a JSON object nor a list of objects.")
    if any(name in value for name in FIELDS):
        yield document(path, "the object", value)
        return
    lists = [
        name
        for name, rows in value.items()
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    ]
    if not lists:
        wanted = listed(FIELDS, " or ")
        raise InputError(path, f"the object has no list of objects and no field {wanted} (fields: {listed(value)}).")
    if len(lists) > 1:
        raise InputError(path, f"holds several lists of objects ({listed(lists)}). Write one of them as JSON lines.")
    for number, row in enumerate(value[lists[0]], 1):
        yield document(path, f'entry {number} of "{shown(lists[0])}"', row)


def _csv(path: Path, file: BufferedIOBase, delimiter: str) -> Iterator[Document]:
    reader = csv.reader((line for _, line in _lines(path, file)), delimiter=delimiter, strict=True)
    header = _next_row(path, reader) or []
    if header.count(TEXT) != 1:
        what = "several columns" if TEXT in header else "no column"
        raise InputError(path, f'{what} "{TEXT}" in the first line (columns: {listed(header)}).')
    column = header.index(TEXT)
    while (row := _next_row(path, reader)) is not None:
        if row and len(row) != len(header):
            raise InputError(
                path,
                f"line {reader.line_num}: {len(row)} columns, but the first line has {len(header)}. Quote the text.",
            )
        if row and row[column]:
            yield row[column]


def _next_row(path: Path, reader: Any) -> list[str] | None:
    """Next row of a CSV reader, None at the end. The module has one limit for the size of all fields, which is restored."""
    before = csv.field_size_limit(MAX_LINE)
    try:
        row: list[str] | None = next(reader, None)
    except csv.Error as error:
        raise InputError(
            path, f"line {reader.line_num}: {shown(str(error))}. Quote the text, with quotation marks doubled."
        ) from error
    finally:
        csv.field_size_limit(before)
    return row
