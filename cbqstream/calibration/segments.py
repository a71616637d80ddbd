"""Segments of token ids from a file of text or token ids.

The selected segments depend only on the content of the files and on the given numbers. Shapes: N segments, S tokens in a segment.
"""

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
"""Selection of segments: the first segments of a file, or segments that are spread evenly over it."""

_TOKENIZER = "tokenizer.json"
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

    The documents of a text are joined with blank lines and tokenized as one text. The tokens are cut into segments without overlap.

    Args:
        data: token ids in a .npy or .safetensors file, or a file of text (see `text.py`).
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
        InputError: the file cannot be read or has too few tokens, or a token is outside the vocabulary.
    """
    token_file, beginning = TOKEN_FILES.get(data.suffix.lower()), list[int]()
    if token_file is not None:
        ids = token_file(data)
    else:
        ids, beginning = _tokenize(data, model, num_samples * seq_len if choice == "first" else None)
    start = beginning if begun else []
    ids = ids[len(start) :]  # removed from the text, because these tokens are put before every segment
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
    """SHA-256 of the shape and the ids, in hex."""
    header = f"{list(ids_NS.shape)}".encode()
    return hashlib.sha256(header + ids_NS.to(torch.int64).numpy().astype("<i8").tobytes()).hexdigest()


def _tokens_before_text(tokenizer: Any) -> list[int]:
    """Tokens that the tokenizer puts before a text: BOS, several tokens or none."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids: list[int] = tokenizer("a")["input_ids"]
    return next((ids[:at] for at in range(len(ids)) if ids[at : at + len(bare)] == bare), [])


def _tokenize(data: Path, model: Path, wanted: int | None) -> tuple[Tensor, list[int]]:
    """Token ids of a file of text, and the tokens that the tokenizer puts before a text.

    Args:
        data: file of text.
        model: folder with the tokenizer.
        wanted: number of ids that are needed; None returns all. If the file has more, at least this number is returned, and no more of the
            text is kept in memory than that needs.
    """
    limit = None if wanted is None else wanted * _CHARACTERS_PER_TOKEN
    text, complete = _text(data, limit)
    tokenizer: Any = load_tokenizer(model)
    while True:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
        if complete or limit is None:
            return ids, _tokens_before_text(tokenizer)
        ids = ids[:-_UNSURE_TOKENS]  # the text was cut, which may have changed how its last words are split into tokens
        if wanted is not None and len(ids) >= wanted:
            return ids, _tokens_before_text(tokenizer)
        limit *= 2
        text, complete = _text(data, limit)


def _text(data: Path, limit: int | None) -> tuple[str, bool]:
    """The documents joined with blank lines, cut after `limit` characters, and whether the text is complete."""
    parts, length = [], 0
    for document in documents(data):
        parts.append(document)
        length += len(document) + len(_SEPARATOR)
        if limit is not None and length > limit:
            return _SEPARATOR.join(parts)[:limit], False
    return _SEPARATOR.join(parts), True


def load_tokenizer(model: Path) -> Any:
    """Load the tokenizer of a model folder.

    Raises:
        InputError: the folder has no tokenizer that transformers can load.
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
