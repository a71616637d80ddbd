"""Download of models from the Hugging Face Hub into the local cache, and upload of results to the Hub.

huggingface_hub reads the endpoint, the token, the folder of the cache and the offline mode from the environment.
"""

import errno
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    SafetensorsParsingError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars, tqdm

from cbqstream.errors import InputError, StorageError, UsageError, shown

Check = Callable[[Path], None]
"""Function that raises an error if the folder with the description of a model is that of a model which cannot be used."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NOT_DOWNLOADED = [
    *("consolidated*", "*/*.safetensors", ".*/*", "*/.*/*"),
    *(f"*.{kind}" for kind in ("bin", "pt", "pth", "ckpt", "h5", "msgpack", "gguf", "ggml", "distcp", "nemo")),
    *(f"*.{kind}" for kind in ("onnx", "onnx_data", "tflite", "mlmodel", "engine")),
]
"""Patterns of files that hold weights of other kinds, or of other parts than the model, and hidden folders."""
_DESCRIPTION = ["config.json", "adapter_config.json", "quant*_config.json", "hf_quant_config.json", ".gitattributes"]
"""Files that are downloaded first. Every repository has the last one; huggingface_hub prints a warning if there is no file to download."""

_FAILURES: tuple[type[Exception], ...] = (
    HfHubHTTPError,
    HfHubHTTPError.__mro__[1],
    NotASafetensorsRepoError,
    SafetensorsParsingError,
    OSError,
    ValueError,
    RuntimeError,
)
"""Exceptions that huggingface_hub raises.

The second one is the base class of all errors of its HTTP client. It is found in this way because versions use different HTTP clients.
"""


def fetch(model: str, revision: str | None = None, check: Check = lambda folder: None) -> Path:
    """Folder of a model, which is downloaded into the local cache first if necessary.

    Args:
        model: a folder, or a name on the Hub such as `owner/name`.
        revision: branch, tag or commit; only for a name.
        check: called with the folder that has the description of the model, before its weights are downloaded.

    Returns:
        `model` itself if it is a folder; for a name, the folder of the snapshot in the local cache.

    Raises:
        InputError: there is neither a folder nor a model on the Hub with this name, or the download failed.
        UsageError: a revision was given for a folder.
        StorageError: there is not enough disk space for the download.
    """
    if revision is not None and Path(model).exists():
        raise UsageError(f"{model} is a folder. --revision is for a name on the Hub.")
    if not is_name(model, revision):
        return Path(model)  # the caller raises an error if this path is not a model folder
    with _hub_errors(model):
        folder = _described(model, revision, check)
        snapshot_download(model, revision=folder.name, ignore_patterns=_NOT_DOWNLOADED)
        shards = _shards_in_subfolders(folder / "model.safetensors.index.json")
        if shards:
            snapshot_download(model, revision=folder.name, allow_patterns=[escape(shard) for shard in shards])
    return folder


def _shards_in_subfolders(index: Path) -> list[str]:
    """Shards in subfolders that an index lists; none if it cannot be read, which is an error when the model is opened."""
    try:
        shards = json.loads(index.read_bytes())["weight_map"].values()
        return sorted({shard for shard in shards if "/" in shard})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []


class _NoBar(tqdm):
    """A progress bar that is not shown."""

    def __init__(self, *values: Any, **options: Any) -> None:
        super().__init__(*values, **{**options, "disable": True})  # type: ignore[no-untyped-call]


def _described(model: str, revision: str | None, check: Check) -> Path:
    """Folder of a model on the Hub with its description. The name of the folder is that of the commit.

    Raises:
        InputError: the model has no config.json.
    """
    folder = Path(snapshot_download(model, revision=revision, allow_patterns=_DESCRIPTION, tqdm_class=_NoBar))
    check(folder)
    if not (folder / "config.json").is_file():
        raise InputError(model, "has no config.json. Give a model in safetensors that transformers can load.")
    return folder


def fetch_headers(
    model: str, revision: str | None = None, check: Check = lambda folder: None
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Download the description of a model on the Hub without its weights.

    Args:
        model: a name on the Hub.
        revision: branch, tag or commit.
        check: called with the folder that has the description, before the headers are read.

    Returns:
        A folder with config.json, and the header of each shard by the name of its file.

    Raises:
        InputError: the Hub has no such model, or the download failed.
        StorageError: there is not enough disk space for config.json.
    """
    disable_progress_bars()
    with _hub_errors(model):
        folder = _described(model, revision, check)
        try:
            shards = HfApi().get_safetensors_metadata(model, revision=folder.name).files_metadata
        # huggingface_hub raises these for a header that is JSON but does not describe tensors
        except (TypeError, AttributeError, LookupError) as error:
            raise InputError(
                model, f"the header of a shard is not plausible ({_reason(error)}). Give another model."
            ) from error
    return folder, {
        file: {name: {**asdict(info), "data_offsets": [*info.data_offsets]} for name, info in held.tensors.items()}
        for file, held in shards.items()
    }


def is_name(model: str, revision: str | None = None) -> bool:
    """Whether a model has to be looked up on the Hub: it is not a local path, and it can be a name on the Hub."""
    return not Path(model).exists() and (revision is not None or _ID.fullmatch(model) is not None)


@contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    """Replace the exceptions of a download, inside a `with`, by errors with a message of one line."""
    try:
        yield
    except GatedRepoError as error:
        raise InputError(
            model, "access to the model is restricted. Accept its terms on the Hub, and log in: hf auth login."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        what = "no such folder, and the Hub was not reached or is turned off (HF_HUB_OFFLINE)"
        raise InputError(model, f"{what}. Download it first: hf download {model}.") from error
    except _FAILURES as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise StorageError(
                f"{model}: the disk of the Hub cache is full. Free some space, or set HF_HOME.", full=True
            ) from error
        raise InputError(
            model,
            f"no such folder, and the download from the Hub failed ({_reason(error)}). Check the name and the connection.",
        ) from error


def require_name(name: str) -> None:
    """Refuse a text that cannot be a name on the Hub; called before a run, not hours later at the upload.

    Raises:
        UsageError: the text is not of the form OWNER/NAME.
    """
    if _ID.fullmatch(name) is None:
        raise UsageError(f"{shown(name)} is not a name on the Hub. Give a name such as OWNER/NAME.")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a model folder to the Hub.

    Args:
        folder: the model folder.
        name: name of the repository on the Hub, OWNER/NAME. The repository is created if it does not exist.
        private: whether a new repository is private.

    Returns:
        Address of the repository.

    Raises:
        UsageError: the name cannot be a name on the Hub.
        StorageError: the upload failed.
    """
    require_name(name)
    try:
        api = HfApi()
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Quantized with cbqstream")
    except _FAILURES as error:
        remedy = "Check the name, and log in: hf auth login."
        raise StorageError(f"{name}: the upload of {folder} to the Hub failed ({_reason(error)}). {remedy}") from error
    return str(repository)


def _reason(error: BaseException) -> str:
    """First line of the message of an exception, safe to print; its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return shown(lines[0] if lines else type(error).__name__)
