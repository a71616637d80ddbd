"""Segments of token ids: which ones are taken is a function of the file and the numbers alone. N segments, S tokens."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from cbqstream.calibration.text import documents
from cbqstream.checkpoint.folder import read_json
from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.errors import InputError

Choice = Literal["first", "spread"]

_TOKENIZER = "tokenizer.json"
_SEPARATOR = "\n\n"
_CHARACTERS_A_TOKEN = 8
_UNSURE_TOKENS = 32


def load_segments(
    data: Path,
    model: Path,
    *,
    num_samples: int,
    seq_len: int,
    vocab_size: int,
    choice: Choice = "first",
    begun: bool = False,
) -> Tensor:
    """Token ids, int64 [N, S]: the text joined with blank lines, tokenized whole and cut without overlap.

    Args:
        data: .npy or .safetensors of token ids, or a file of text (see `text.py`).
        model: folder with the tokenizer.
        num_samples: N.
        seq_len: S.
        vocab_size: ids must be below.
        choice: `first` N segments, or `spread` evenly over the file, both ends included (all of them if there are fewer).
        begun: whether every segment of a text begins as the tokenizer begins a text, as with BOS; else only the first does.

    Raises:
        InputError: the file cannot be read, or has too few tokens, or a token is outside the vocabulary.
    """
    token_file, beginning = TOKEN_FILES.get(data.suffix.lower()), list[int]()
    if token_file is not None:
        ids = token_file(data)
    else:
        ids, beginning = _tokenize(data, model, num_samples * seq_len if choice == "first" else None)
    start = beginning if begun else []
    ids = ids[len(start) :]  # it is put before every segment
    length = seq_len - len(start)
    rows = len(ids) // length
    needed = num_samples * length if choice == "first" else length
    if len(ids) < needed:
        raise InputError(
            data,
            f"has {len(ids):,} tokens, {needed:,} are needed ({needed // length} x {length}). Use more text, or fewer samples.",
        )
    segments = ids[: rows * length].view(rows, length)
    if choice == "first":
        segments = segments[:num_samples]
    elif rows > num_samples:
        segments = segments[torch.linspace(0, rows - 1, num_samples).long()]
    segments = torch.cat([torch.tensor(start, dtype=torch.int64).expand(len(segments), -1), segments], dim=1)
    smallest, largest = int(segments.min()), int(segments.max())
    if smallest < 0 or largest >= vocab_size:
        raise InputError(
            data, f"token {largest if smallest >= 0 else smallest} is outside the vocabulary of {vocab_size:,}."
        )
    return segments.contiguous()


def segments_digest(ids_NS: Tensor) -> str:
    """SHA-256 over the shape and the ids, in hex."""
    header = f"{list(ids_NS.shape)}".encode()
    return hashlib.sha256(header + ids_NS.to(torch.int64).numpy().astype("<i8").tobytes()).hexdigest()


def _beginning(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: BOS, more, or nothing."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids: list[int] = tokenizer("a")["input_ids"]
    return next((ids[:at] for at in range(len(ids)) if ids[at : at + len(bare)] == bare), [])


def _tokenize(data: Path, model: Path, wanted: int | None) -> tuple[Tensor, list[int]]:
    """Token ids of the file, all of them or at least `wanted` if there are so many, and those before a text. No more text is held than
    that needs."""
    limit = None if wanted is None else wanted * _CHARACTERS_A_TOKEN
    text, complete = _text(data, limit)
    tokenizer: Any = load_tokenizer(model)
    while True:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
        if complete or limit is None:
            return ids, _beginning(tokenizer)
        ids = ids[:-_UNSURE_TOKENS]  # the cut may have changed how the last words were split
        if wanted is not None and len(ids) >= wanted:
            return ids, _beginning(tokenizer)
        limit *= 2
        text, complete = _text(data, limit)


def _text(data: Path, limit: int | None) -> tuple[str, bool]:
    """The documents joined with blank lines, up to about `limit` characters, and whether that is the whole file."""
    parts, length = [], 0
    for document in documents(data):
        parts.append(document)
        length += len(document) + len(_SEPARATOR)
        if limit is not None and length > limit:
            return _SEPARATOR.join(parts)[:limit], False
    return _SEPARATOR.join(parts), True


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        InputError: it has none that transformers can load.
    """
    if (model / _TOKENIZER).exists():
        read_json(model, _TOKENIZER)
    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            model, "no tokenizer that transformers can load. Give token ids (.npy) instead of text."
        ) from error


def _npy(path: Path) -> Tensor:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(path, "not a .npy file of numbers.") from error
    if not isinstance(values, np.ndarray):
        raise InputError(path, "not a .npy file of numbers.")
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(path, f"holds {values.dtype}, token ids are integers.")
    return torch.from_numpy(values.astype(np.int64)).flatten()


def _safetensors(path: Path) -> Tensor:
    infos = read_header(path)
    if len(infos) != 1:
        raise InputError(path, f"holds {len(infos)} tensors, needs one of token ids.")
    (name,) = infos
    values = Checkpoint(infos).read(name, device=torch.device("cpu"))
    if values.is_floating_point() or values.dtype == torch.bool:
        raise InputError(path, f"holds {values.dtype}, token ids are integers.", tensor=name)
    return values.to(torch.int64).flatten()


TOKEN_FILES: Mapping[str, Callable[[Path], Tensor]] = MappingProxyType({".npy": _npy, ".safetensors": _safetensors})
"""What reads files of token ids, by their ending; others hold text."""
