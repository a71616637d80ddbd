"""Segments of token ids from a file of text or token ids.

The selected segments depend only on the content of the files and on the given numbers. Shapes: N segments, S tokens in a segment.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cbqstream.calibration.rows import Chat
from cbqstream.calibration.text import documents, require_file
from cbqstream.calibration.tokenizer import load_tokenizer, render, token_ids, tokens_before_text
from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.errors import InputError

Choice = Literal["first", "spread"]
"""Selection of segments: the first segments of a file, or segments that are spread evenly over it."""

_SEPARATOR = "\n\n"
_CHARACTERS_PER_TOKEN = 8
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
    """Load segments of token ids from a file.

    The documents of a text are joined with blank lines and tokenized as one text; chats, which the chat template of the model renders, are
    joined with nothing. The tokens are cut into segments without overlap.

    Args:
        data: token ids in a .npy or .safetensors file, or a file of text or chats (see `text.py`).
        model: folder with the tokenizer.
        num_samples: number of segments, N.
        seq_len: tokens in a segment, S.
        vocab_size: size of the vocabulary; all ids must be smaller.
        choice: `first` selects the first N segments. `spread` selects N segments that are spread evenly over the file, both ends
            included, or all segments if there are fewer.
        begun: whether every segment of a text starts with the tokens that the tokenizer puts before a text, such as BOS. If False, only the
            first segment of the file does.

    Returns:
        Token ids, int64 [N, S].

    Raises:
        InputError: the file cannot be read or has too few tokens, the tokenizer cannot be loaded, or a token is outside the vocabulary.
    """
    require_file(data)
    token_file = TOKEN_FILES.get(data.suffix.lower())
    if token_file is not None:
        tokens = _Tokens(token_file(data))
    else:
        tokens = _tokenize(data, model, num_samples * seq_len if choice == "first" else None)
    start = tokens.beginning if begun else ()
    ids = tokens.ids[len(start) :]  # removed from the text, because these tokens are put before every segment
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
    outside = segments[(segments < 0) | (segments >= vocab_size)]
    if len(outside) and tokens.tokenizer_size is not None:
        raise InputError(
            model,
            f"the tokenizer has {tokens.tokenizer_size:,} tokens, but the model has {vocab_size:,}: token {int(outside[0])} of the text is "
            "outside. The tokenizer belongs to another model. Use the tokenizer files of this model.",
        )
    if len(outside):
        raise InputError(data, f"token {int(outside[0])} is outside the vocabulary of {vocab_size:,}.")
    return segments.contiguous()


def segments_digest(ids_NS: Tensor) -> str:
    """SHA-256 of the shape and the ids, in hex."""
    header = f"{list(ids_NS.shape)}".encode()
    return hashlib.sha256(header + ids_NS.to(torch.int64).numpy().astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Token ids of a file."""

    ids: Tensor
    """int64 [number of tokens]."""
    beginning: tuple[int, ...] = ()
    """Tokens that the tokenizer puts before a text."""
    tokenizer_size: int | None = None
    """Number of tokens of the tokenizer, if the file holds text."""


def _tokenize(data: Path, model: Path, wanted: int | None) -> _Tokens:
    """Token ids of a file of text or chats.

    Args:
        data: file of text or chats.
        model: folder with the tokenizer.
        wanted: number of ids that are needed; None returns all. If the file has more, at least this number is returned, and no more of the
            text is kept in memory than that needs.
    """
    limit = None if wanted is None else wanted * _CHARACTERS_PER_TOKEN
    loaded = cache(partial(load_tokenizer, model))  # loaded after the text is read, unless the text needs it
    while True:
        text, complete = _text(data, limit, lambda chat: render(loaded(), model, data, chat))
        tokenizer = loaded()
        ids = token_ids(tokenizer, model, text)
        if not complete:  # the text was cut, which may have changed how its last words are split into tokens
            ids = ids[:-_UNSURE_TOKENS]
        if complete or limit is None or wanted is None or len(ids) >= wanted:
            return _Tokens(ids, tuple(tokens_before_text(tokenizer)), len(tokenizer))
        limit *= 2


def _text(data: Path, limit: int | None, render_chat: Callable[[Chat], str]) -> tuple[str, bool]:
    """The documents joined with blank lines, and chats with nothing, cut after `limit` characters, and whether the text is complete."""
    parts, length = list[str](), 0
    for document in documents(data):
        part, separator = (render_chat(document), "") if isinstance(document, Chat) else (document, _SEPARATOR)
        parts += [separator, part] if parts else [part]
        length += len(part) + len(separator)
        if limit is not None and length > limit:
            return "".join(parts)[:limit], False
    return "".join(parts), True


def _npy(path: Path) -> Tensor:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(path, "not a .npy file of numbers.") from error
    if not isinstance(values, np.ndarray):
        raise InputError(path, "not a .npy file of numbers.")
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(path, f"holds {values.dtype} values, but token ids are integers.")
    return torch.from_numpy(values.astype(np.int64)).flatten()


def _safetensors(path: Path) -> Tensor:
    infos = read_header(path)
    if len(infos) != 1:
        raise InputError(path, f"holds {len(infos)} tensors. Give a file with one tensor of token ids.")
    (name,) = infos
    values = Checkpoint(infos).read(name, device=torch.device("cpu"))
    if values.is_floating_point() or values.dtype == torch.bool:
        raise InputError(path, f"holds {values.dtype} values, but token ids are integers.", tensor=name)
    return values.to(torch.int64).flatten()


TOKEN_FILES: Mapping[str, Callable[[Path], Tensor]] = MappingProxyType({".npy": _npy, ".safetensors": _safetensors})
"""Functions that read files of token ids, by the suffix of the file name; files with other suffixes hold text."""
