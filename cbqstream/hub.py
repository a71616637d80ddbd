"""Models on the Hugging Face Hub: from there into the local cache, and results to there. Endpoint, token, cache and offline mode are what
huggingface_hub takes from the environment."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    SafetensorsParsingError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from cbqstream.errors import InputError, StorageError, UsageError, shown

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NEVER_READ = [
    "*/*",
    "consolidated*",
    *(f"*.{suffix}" for suffix in ("bin", "pt", "pth", "ckpt", "h5", "msgpack", "gguf", "onnx")),
]


_FAILURES: tuple[type[Exception], ...] = (
    HfHubHTTPError,
    HfHubHTTPError.__mro__[1],
    NotASafetensorsRepoError,
    SafetensorsParsingError,
    OSError,
    ValueError,
    RuntimeError,
)
"""What huggingface_hub raises; second the base of all errors of its HTTP client, which is another one in other versions."""


def fetch(model: str, revision: str | None = None) -> Path:
    """The folder of a model: itself, or for a name such as `owner/name` the snapshot in the local cache, downloaded where it is not there.

    Args:
        model: a folder, or a name on the Hub.
        revision: branch, tag or commit; only for a name.

    Raises:
        InputError: there is neither, or it cannot be had.
        UsageError: a revision of a folder.
        StorageError: there is no room for it.
    """
    if revision is not None and Path(model).exists():
        raise UsageError(f"{model} is a folder. --revision is for a name on the Hub.")
    if not is_name(model, revision):
        return Path(model)  # who opens it says what is wrong with it
    with _asking_for(model):
        return Path(snapshot_download(model, revision=revision, ignore_patterns=_NEVER_READ))


def fetch_headers(model: str, revision: str | None = None) -> tuple[Path, dict[str, dict[str, Any]]]:
    """What is said of a model on the Hub, without its weights: a folder with its config.json, and the header of each shard by its name.

    Raises:
        InputError: it cannot be had.
    """
    disable_progress_bars()
    with _asking_for(model):
        config = Path(hf_hub_download(model, "config.json", revision=revision))
        try:
            shards = HfApi().get_safetensors_metadata(model, revision=revision).files_metadata
        # what a header that is JSON, and no header, does to it
        except (TypeError, AttributeError, LookupError) as error:
            raise InputError(model, f"the header of a shard is not plausible ({_told(error)}).") from error
    return config.parent, {
        file: {name: {**asdict(info), "data_offsets": [*info.data_offsets]} for name, info in held.tensors.items()}
        for file, held in shards.items()
    }


def is_name(model: str, revision: str | None = None) -> bool:
    """Whether a model is to be looked for on the Hub: it is no folder, and could be a name there."""
    return not Path(model).exists() and (revision is not None or _ID.fullmatch(model) is not None)


@contextmanager
def _asking_for(model: str) -> Iterator[None]:
    """What the Hub answers instead of a model, in one line."""
    try:
        yield
    except GatedRepoError as error:
        raise InputError(model, "needs an agreement on the Hub. Accept it there, and log in: hf auth login.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        what = "no such folder, and the Hub was not reached or is turned off (HF_HUB_OFFLINE)"
        raise InputError(model, f"{what}. Download it first: hf download {model}.") from error
    except _FAILURES as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise StorageError(f"{model}: no room in the cache. Free some, or set HF_HOME.", full=True) from error
        raise InputError(model, f"no such folder, and not had from the Hub: {_told(error)}") from error


def require_name(name: str) -> None:
    """Refuse what cannot be a name on the Hub, before hours of work.

    Raises:
        UsageError: it is none.
    """
    if _ID.fullmatch(name) is None:
        raise UsageError(f"{shown(name)} is not a name on the Hub, such as OWNER/NAME.")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a model folder; its address. The repository is made where it does not exist.

    Raises:
        UsageError: the name is none.
        StorageError: it was not taken.
    """
    require_name(name)
    try:
        api = HfApi()
        made = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Quantized with cbqstream")
    except _FAILURES as error:
        remedy = "Check the name, and log in: hf auth login."
        raise StorageError(f"{name}: the Hub did not take {folder}: {_told(error)} {remedy}") from error
    return str(made)


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return shown(lines[0] if lines else type(error).__name__)
