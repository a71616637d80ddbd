"""The header of a safetensors file, which is checked against the file before memory is allocated for the tensors.

Format: 8 bytes with the length N, little-endian; N bytes of JSON, `{name: {dtype, shape, data_offsets}}`; then the data without gaps.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cbqstream.checkpoint.tensors import TensorInfo
from cbqstream.errors import InputError, shown

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 2_000_000
_MAX_NAME = 1024

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes in which tensors are read, by the name in the header."""
_COPIED_BITS = {
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
    "C64": 64,
}
"""Bits of a value in each of the other dtypes of safetensors 0.8. Their tensors are copied byte for byte, and not read."""
_BITS = {**{name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}, **_COPIED_BITS}

_OTHER_KINDS = (
    (b"version https://git-lfs", "a git-lfs pointer, not weights. Run `git lfs pull` in the model's folder."),
    (b"PK\x03\x04", "a pickle checkpoint, which is never read. Convert it to safetensors first."),
    (b"\x80\x02", "a pickle checkpoint, which is never read. Convert it to safetensors first."),
    (b"GGUF", "a GGUF file. Convert it to safetensors first."),
    (b"<", "an HTML page, not weights (a failed download?). Download it again."),
)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file: the tensors by name, in the order of their data.

    Raises:
        InputError: the file is missing, not a regular file, not safetensors or truncated, or its header contradicts itself or the file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(path, f"cannot be opened: {error.strerror}. Make it readable.") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise InputError(path, "not a regular file. Replace it by the shard.")
    with os.fdopen(handle, "rb") as file:
        start = file.read(64)
        _refuse_other_kinds(path, start)
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise _broken(path, f"header of {length:,} bytes exceeds the {MAX_HEADER_BYTES:,} limit")
        if 8 + length > status.st_size:
            raise InputError(
                path, f"header is {length} bytes long, file has {status.st_size} (truncated?). Download it again."
            )
        file.seek(8)
        entries = _parse(path, file.read(length))
    return _checked(path, entries, data_start=8 + length, file_size=status.st_size)


def described(path: Path, entries: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The tensors of a header that was read elsewhere, by name, without a check against the file.

    Args:
        path: the file that the header describes; it need not exist.
        entries: the entries of the header by tensor name, without metadata.

    Raises:
        InputError: an entry is not plausible.
    """
    return {name: _tensor(path, name, entry) for name, entry in entries.items()}


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    if not start:
        raise InputError(path, "empty file (0 bytes). Download it again.")
    if start[8:9] == b"{":  # safetensors; with a header of 640 bytes, the file starts with the first bytes of a pickle
        return
    for magic, what in _OTHER_KINDS:
        if start.startswith(magic):
            raise InputError(path, what)
    if len(start) < 8:
        raise InputError(path, f"too short to be safetensors ({len(start)} bytes). Download it again.")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise _broken(path, f'"{shown(twice)}" appears twice in the header')
        return result

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as error:
        raise _broken(path, "header is not JSON (too deeply nested)") from error
    except ValueError as error:
        raise _broken(path, "header is not JSON") from error
    if not isinstance(entries, dict):
        raise _broken(path, "header is not a JSON object")
    if len(entries) > MAX_TENSORS:
        raise _broken(path, f"header has {len(entries):,} tensors, more than the {MAX_TENSORS:,} limit")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "metadata of the header is not text")
    return entries


def _checked(path: Path, entries: dict[str, Any], *, data_start: int, file_size: int) -> dict[str, TensorInfo]:
    tensors = sorted(
        (_tensor(path, name, entry) for name, entry in entries.items()), key=lambda info: (info.start, info.end)
    )
    expected = 0
    for info in tensors:
        if info.start != expected:
            raise _broken(path, "bytes overlap or leave a hole", tensor=info.name)
        expected = info.end
    if data_start + expected != file_size:
        raise InputError(
            path, f"file is {file_size} bytes, header describes {data_start + expected}. Download it again."
        )
    return {info.name: replace(info, start=data_start + info.start, end=data_start + info.end) for info in tensors}


def _tensor(path: Path, name: str, entry: Any) -> TensorInfo:
    if len(name) > _MAX_NAME or not name.isprintable() or "/" in name or ".." in name or not name:
        problem = f'tensor name "{shown(name)}" is empty, a path, too long or not printable'
        raise InputError(path, f"{problem}. Save the model with another name.")
    if not isinstance(entry, dict):
        raise _broken(path, "header entry is not an object", tensor=name)
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise InputError(
            path, f"dtype {shown(str(dtype))} is not known. Convert it to bf16, fp16 or fp32.", tensor=name
        )
    if not _is_sizes(shape):
        raise _broken(path, "shape is not plausible", tensor=name)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(path, f"offsets {shown(str(offsets))} are not valid", tensor=name)
    needed, rest = divmod(math.prod((_BITS[dtype], *shape)), 8)
    if rest or needed >= 1 << 48 or max(shape, default=0) >= 1 << 40:
        raise _broken(path, "shape is not plausible", tensor=name)
    if offsets[1] - offsets[0] != needed:
        given = offsets[1] - offsets[0]
        raise _broken(path, f"shape {shape} {dtype} needs {needed} bytes, header gives {given}", tensor=name)
    return TensorInfo(name, dtype, DTYPES.get(dtype), tuple(shape), path, offsets[0], offsets[1])


def _broken(path: Path, what: str, *, tensor: str | None = None) -> InputError:
    """The error for a header that no program writes: the file is damaged, or another kind of file."""
    return InputError(path, f"{what}. Download the file again, or save it again.", tensor=tensor)


def _is_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value)
    )
