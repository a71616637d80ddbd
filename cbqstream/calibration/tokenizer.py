"""The tokenizer of a model folder: loading it, with the reason where that fails, and rendering chats."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from logging.handlers import BufferingHandler
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.import_utils import (
    is_mistral_common_available,
    is_protobuf_available,
    is_sentencepiece_available,
    is_tiktoken_available,
)

from cbqstream.calibration.rows import Chat
from cbqstream.checkpoint.folder import read_json
from cbqstream.errors import InputError, shown

_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_ANY_CLASS = (_TOKENIZER, "tokenizer.model", "tekken.json", "tiktoken.model")
"""Files of a vocabulary that transformers reads for every class of tokenizer."""
_VOCABULARIES = (*_ANY_CLASS, "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
_PROBED = 10_000
_SENTENCEPIECE = b"\n"
"""First byte of a sentencepiece model; a file of tiktoken begins with base64."""
_INSTALLED: Mapping[str, Callable[[], bool]] = MappingProxyType(
    {
        "mistral-common": is_mistral_common_available,
        "protobuf": is_protobuf_available,
        "sentencepiece": is_sentencepiece_available,
        "tiktoken": lambda: is_tiktoken_available(with_blobfile=False),
    }
)
"""Functions that tell whether a package is installed, by its name."""
_IDS = "give token ids (.npy or .safetensors) instead of text."
_DATE = datetime(2024, 7, 26)
_DATED = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('%{code}', '{_DATE.strftime(f'%{code}')}')" for code in (*"aAbBcdDeFHIjmMpSTxXyY", "-d", "-m"))
    + " }}{% endmacro %}{{ '' }}"
)
"""Beginning of a chat template in which the current date is a fixed one, so that a run that resumes on another day has the same tokens."""


def load_tokenizer(model: Path) -> Any:
    """Load the tokenizer of a model folder.

    Raises:
        InputError: the folder has no tokenizer that transformers can load, or only with code of the model or a missing package.
    """
    for name in _VOCABULARIES:
        _refuse_placeholder(model / name)
    if (model / _TOKENIZER).exists():
        read_json(model, _TOKENIZER)
    try:
        with _warnings_after_success():
            tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise _failure(model, error) from error
    named = getattr(tokenizer, "vocab_files_names", {}).values()
    if named and not _has_any(model, {*named, *_ANY_CLASS}):  # transformers then returns a tokenizer without vocabulary
        raise _no_files(model, {*named, *_ANY_CLASS})
    return tokenizer


def token_ids(tokenizer: Any, model: Path, text: str) -> Tensor:
    """Token ids of a text, with the special tokens that the tokenizer adds, int64 [number of tokens].

    Args:
        tokenizer: the tokenizer of the model.
        model: folder of the model, for errors.
        text: the text.

    Raises:
        InputError: the tokenizer fails, or it knows no word of the text.
    """
    try:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(
            model, f"the tokenizer fails on the text ({_reason(error)}). Correct its files, or {_IDS}"
        ) from error
    if text.strip() and set(ids[:_PROBED].tolist()) <= set(tokenizer.all_special_ids):
        raise InputError(
            model,
            "the tokenizer knows no word of the text. Its vocabulary is damaged, or is that of another language. Download it again.",
        )
    return ids


def tokens_before_text(tokenizer: Any) -> list[int]:
    """Tokens that the tokenizer puts before a text: BOS, several tokens or none."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids: list[int] = tokenizer("a")["input_ids"]
    return next((ids[:at] for at in range(len(ids)) if ids[at : at + len(bare)] == bare), [])


def render(tokenizer: Any, model: Path, data: Path, chat: Chat) -> str:
    """Text of a chat by the chat template of a tokenizer, without the tokens that the tokenizer itself puts before a text.

    Args:
        tokenizer: the tokenizer of the model.
        model: folder of the model, for errors.
        data: the file with the chat, for errors.
        chat: the chat.

    Raises:
        InputError: the tokenizer has no chat template, or the template refuses the chat.
    """
    if not tokenizer.chat_template:
        raise InputError(
            data,
            f"{chat.place} is a chat, but the tokenizer of {model} has no chat template. "
            'Add chat_template.jinja to the model, or give rows with a field "text".',
        )
    try:
        template = tokenizer.get_chat_template()
        text: str = tokenizer.apply_chat_template([*chat.messages], tokenize=False, chat_template=_DATED + template)
        text.encode()
    except Exception as error:
        raise InputError(
            data, f"{chat.place}: the chat template of the model refuses the chat ({_reason(error)}). Correct the chat."
        ) from error
    return text.removeprefix("".join(tokenizer.convert_ids_to_tokens(tokens_before_text(tokenizer))))


def _refuse_placeholder(path: Path) -> None:
    """Refuse a file that a download left empty or as a git-lfs pointer."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise InputError(path, "empty file (0 bytes). Download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(path, "a git-lfs pointer, not a tokenizer. Run `git lfs pull` in the model's folder.")


@contextmanager
def _warnings_after_success() -> Iterator[None]:
    """Hold back what transformers logs, and log it at the end; if an exception is raised, it is dropped."""
    library, held = logging.getLogger("transformers"), BufferingHandler(capacity=1000)
    handlers, propagate = library.handlers, library.propagate
    library.handlers, library.propagate = [held], False
    try:
        yield
    finally:
        library.handlers, library.propagate = handlers, propagate
    for record in held.buffer:
        library.handle(record)


def _failure(model: Path, error: Exception) -> InputError:
    """The error that states why transformers cannot load a tokenizer, as far as the files and the exception show it."""
    config = read_json(model, _CONFIG) if (model / _CONFIG).exists() else {}
    if "trust_remote_code" in str(error):
        code = shown(json.dumps(config.get("auto_map")))
        return InputError(
            model, f"the tokenizer needs code of the model (auto_map: {code}), which is never run. {_IDS.capitalize()}"
        )
    for path in [] if (model / _TOKENIZER).exists() else sorted(model.glob("*.model")):
        missing = [name for name in _packages_for(path) if not _INSTALLED[name]()]
        if missing:
            return InputError(path, f"transformers needs {' and '.join(missing)} to read it. {_install(missing)}")
    if isinstance(error, ImportError):
        named = [name for name in _INSTALLED if name in str(error).lower()]
        return InputError(
            model, f"the tokenizer needs a package that is not installed ({_reason(error)}). {_install(named)}"
        )
    if not _has_any(model, _VOCABULARIES):
        return _no_files(model, _VOCABULARIES)
    return _broken(model, error)


def _packages_for(path: Path) -> tuple[str, ...]:
    """Packages that read a vocabulary; what is not a sentencepiece model is read as a file of tiktoken."""
    with path.open("rb") as file:
        return ("sentencepiece", "protobuf") if file.read(1) == _SENTENCEPIECE else ("tiktoken",)


def _install(packages: Iterable[str]) -> str:
    names = " ".join(packages)
    return f"{f'Run: pip install {names}' if names else 'Install it'}, or {_IDS}"


def _has_any(model: Path, names: Iterable[str]) -> bool:
    return any((model / name).exists() for name in names) or any(model.glob("tokenizer.*"))


def _no_files(model: Path, names: Iterable[str]) -> InputError:
    return InputError(
        model, f"no tokenizer (looked for {', '.join(sorted(names))}). Add the file of the model, or {_IDS}"
    )


def _broken(model: Path, error: Exception) -> InputError:
    """The error about files that are complete but not understood; raised at tokenizer.json if that file alone cannot be read."""
    path = model / _TOKENIZER
    if path.exists():
        try:
            PreTrainedTokenizerFast(tokenizer_file=str(path))  # type: ignore[no-untyped-call]
        except Exception as reason:
            raise _unreadable(path, reason) from reason
    return _unreadable(model, error)


def _unreadable(place: Path, error: Exception) -> InputError:
    library = f"transformers {version('transformers')}"
    return InputError(
        place,
        f"{library} cannot load the tokenizer ({_reason(error)}). Download it again, upgrade transformers, or {_IDS}",
    )


def _reason(error: Exception) -> str:
    """Class and first line of an exception, safe to print."""
    return shown(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
