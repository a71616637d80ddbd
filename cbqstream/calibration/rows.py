"""Documents of rows: a row of a dataset holds a text, or a chat that the chat template of a model renders."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cbqstream.errors import InputError, shown

TEXT = "text"
"""Field with the text of a row."""
FIELDS = (TEXT, "messages", "conversations")
"""Fields with the document of a row; the first that a row has is used. The others than `text` hold messages."""
_ROLES: Mapping[object, str] = MappingProxyType(
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "observation": "tool",
        "tool": "tool",
    }
)
"""Roles of chat templates, by the names that messages with `from` and `value` use."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages of a conversation, as a chat template takes them."""

    messages: tuple[dict[str, Any], ...]
    """Each has the key `role`, and nearly always `content`."""
    place: str
    """Place in the file, such as "line 3", for messages about errors."""


Document = str | Chat


def field_of(path: Path, place: str, names: Iterable[str], kind: str = "field") -> str:
    """Name of the field or column that holds the document of a row.

    Args:
        path: the file, for the error.
        place: place in the file, for the error.
        names: names of all fields or columns.
        kind: "field" or "column", for the error.

    Raises:
        InputError: no field holds a document.
    """
    names = [*names]
    found = next((name for name in FIELDS if name in names), None)
    if found is None:
        raise InputError(path, f"{place} has no {kind} {listed(FIELDS, ' or ')} ({kind}s: {listed(names)}).")
    return found


def listed(names: Iterable[str], last: str = ", ") -> str:
    """Names in quotation marks, safe to print.

    Args:
        names: the names.
        last: separator before the last name.
    """
    *others, final = [f'"{name}"' for name in names] or ["none"]
    return shown(f"{', '.join(others)}{last if others else ''}{final}")


def document(path: Path, place: str, row: object) -> Document:
    """Document of a row: the field `text`, or else the messages in `messages` or `conversations`.

    Args:
        path: the file, for errors.
        place: place of the row in the file.
        row: the row, a table from field names to values.

    Raises:
        InputError: the row is not a table, has none of these fields, or a value is not a text or a list of messages.
        UnicodeEncodeError: a text contains an unpaired surrogate. JSON escapes can, and UTF-8 cannot encode it.
    """
    if not isinstance(row, dict):
        raise InputError(path, f'{place} is not a JSON object with a field "{TEXT}".')
    name = field_of(path, place, row)
    value = row[name]
    if name == TEXT:
        if not isinstance(value, str):
            raise InputError(path, f'{place}: "{TEXT}" is not a string.')
        value.encode()
        return value
    if not isinstance(value, list) or not value:
        raise InputError(path, f'{place}: "{name}" is empty or not a list of messages.')
    return Chat(tuple(_message(path, f"{place}, message {at}", given) for at, given in enumerate(value, 1)), place)


def _message(path: Path, place: str, given: object) -> dict[str, Any]:
    """A message as chat templates take it; parquet stores the keys that a message lacks as None."""
    if not isinstance(given, dict):
        raise InputError(path, f"{place} is not a JSON object.")
    message = {key: value for key, value in given.items() if value is not None}
    for value in message.values():
        if isinstance(value, str):
            value.encode()
    if isinstance(message.get("role"), str) and (isinstance(message.get("content"), str) or "tool_calls" in message):
        return message
    if isinstance(message.get("from"), str) and isinstance(message.get("value"), str):
        if message["from"] not in _ROLES:
            known = listed((str(role) for role in _ROLES), " or ")
            raise InputError(path, f'{place}: "from" is "{shown(message["from"])}", not {known}.')
        return {"role": _ROLES[message["from"]], "content": message["value"]}
    raise InputError(
        path, f'{place} has no texts "role" and "content", or "from" and "value" (fields: {listed(message)}).'
    )
