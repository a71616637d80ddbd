"""Lazy reading of tensors by name.

Each tensor is read with pread into memory of its own. Files are never mapped into memory, and neither a whole file nor the whole model is
read at once.
"""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cbqstream.checkpoint.folder import find_tensors
from cbqstream.errors import InputError
from cbqstream.records import TensorInfo

_COPY_BYTES = 16 << 20
_SAMPLE_BYTES = 4 << 10


class Checkpoint:
    """Tensors of files that are read on demand.

    Args:
        infos: location of each tensor, by name.
    """

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self.infos = infos
        self._open: dict[Path, Any] = {}

    @classmethod
    def open(cls, folder: Path, *, allow_links: bool = False) -> Self:
        """Open a model folder with a `model.safetensors`, or with shards and their index.

        Args:
            folder: the model folder.
            allow_links: read shards that are links to files outside the folder.

        Raises:
            InputError: the folder has no valid safetensors, see `find_tensors`.
        """
        return cls(find_tensors(folder, allow_links=allow_links))

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""
        return {name: info.shape for name, info in self.infos.items()}

    def read(self, name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor.

        Args:
            name: name of the tensor.
            device: device of the result.
            dtype: dtype of the result; by default, the dtype in which the tensor is stored.

        Raises:
            InputError: the file changed or can no longer be read, or the tensor has a dtype that is only copied.
            KeyError: no tensor has this name.
        """
        info = self.infos[name]
        stored = info.dtype
        try:
            if info.file not in self._open:
                self._open[info.file] = safe_open(info.file, framework="pt", device="cpu", backend="pread")
            tensor: Tensor = self._open[info.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(info.file, f"cannot be read: {error}. Restore the file.", tensor=name) from error
        if tuple(tensor.shape) != info.shape or tensor.dtype != stored:
            raise InputError(info.file, "changed while it was being read. Restore the file.", tensor=name)
        return tensor.to(device=device, dtype=dtype or stored)

    def under(self, prefix: str, device: torch.device) -> Mapping[str, Tensor]:
        """The tensors whose names begin with `prefix`, by the rest of their names; each access reads a tensor."""
        return _PrefixedTensors(self, prefix, device)

    def fingerprint(self) -> str:
        """SHA-256 in hex of the names, dtypes and shapes, and of 4 KiB at the start, the middle and the end of each tensor.

        Reading every byte of a large model would take minutes. The sample detects a model from another training run, because training
        changes every tensor.
        """
        digest = hashlib.sha256()
        for name in sorted(self.infos):
            info = self.infos[name]
            digest.update(f"{name}|{info.torch_dtype or info.stored_dtype}|{list(info.shape)}|".encode())
            with info.file.open("rb") as file:
                for start in (info.start, info.start + info.num_bytes // 2, max(info.start, info.end - _SAMPLE_BYTES)):
                    file.seek(start)
                    digest.update(file.read(min(_SAMPLE_BYTES, info.end - start)))
        return digest.hexdigest()

    def input_quantizer(self, name: str) -> None:
        """Return None, because a dense checkpoint quantizes no inputs."""

    @contextmanager
    def reading_ahead(self, names: Iterable[str]) -> Iterator[None]:
        """Read tensors into the page cache on a thread, inside a `with`.

        The operating system keeps the page cache as long as it can. The cached tensors take no memory of the process. Errors are ignored
        here, because `read` raises them later.
        """
        stopped = threading.Event()

        def load() -> None:
            with suppress(InputError, OSError):
                for name in names:
                    for _ in self.raw(name):
                        if stopped.is_set():
                            return

        thread = threading.Thread(target=load, name="weights-ahead", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()

    def raw(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor as they are stored in the file, in pieces of 16 MiB.

        Raises:
            InputError: the file became shorter.
        """
        info = self.infos[name]
        with info.file.open("rb") as file:
            file.seek(info.start)
            left = info.num_bytes
            while left:
                piece = file.read(min(left, _COPY_BYTES))
                if not piece:
                    raise InputError(info.file, "changed while it was being read. Restore the file.", tensor=name)
                left -= len(piece)
                yield piece


class _PrefixedTensors(Mapping[str, Tensor]):
    """Tensors of a checkpoint whose names begin with a prefix, by the rest of their names."""

    def __init__(self, source: Checkpoint, prefix: str, device: torch.device) -> None:
        self._source, self._prefix, self._device = source, prefix, device

    def __getitem__(self, name: str) -> Tensor:
        return self._source.read(self._prefix + name, device=self._device)

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._source.infos if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
