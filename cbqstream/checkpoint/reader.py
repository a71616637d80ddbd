"""Lazy reads by name. Tensors come by pread into their own memory: never mmap, never a whole file, never the whole model."""

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
    """Tensors described by `infos` and read on demand."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self.infos = infos
        self._open: dict[Path, Any] = {}

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The tensors of a model folder: `model.safetensors`, or shards and their index.

        Raises:
            InputError: see `find_tensors`.
        """
        return cls(find_tensors(folder))

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: info.shape for name, info in self.infos.items()}

    def read(self, name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on `device`, in `dtype` or as stored.

        Raises:
            InputError: the file changed or can no longer be read.
            KeyError: no tensor has this name.
        """
        info = self.infos[name]
        try:
            if info.file not in self._open:
                self._open[info.file] = safe_open(info.file, framework="pt", device="cpu", backend="pread")
            tensor: Tensor = self._open[info.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(info.file, f"cannot be read: {error}.", tensor=name) from error
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise InputError(info.file, "changed while it was being read.", tensor=name)
        return tensor.to(device=device, dtype=dtype or info.dtype)

    def under(self, prefix: str, device: torch.device) -> Mapping[str, Tensor]:
        """The tensors whose name begins with `prefix`, by the rest of it; each is read when it is asked for."""
        return _Under(self, prefix, device)

    def fingerprint(self) -> str:
        """SHA-256, in hex, over names, dtypes, shapes, and 4 KiB from the start, the middle and the end of every tensor.

        Reading every byte of a large model takes minutes; another training run changes every tensor, so a sample shows it.
        """
        digest = hashlib.sha256()
        for name in sorted(self.infos):
            info = self.infos[name]
            digest.update(f"{name}|{info.dtype}|{list(info.shape)}|".encode())
            with info.file.open("rb") as file:
                for start in (info.start, info.start + info.num_bytes // 2, max(info.start, info.end - _SAMPLE_BYTES)):
                    file.seek(start)
                    digest.update(file.read(min(_SAMPLE_BYTES, info.end - start)))
        return digest.hexdigest()

    def input_quantizer(self, name: str) -> None:
        """None: a dense checkpoint quantizes no inputs."""

    @contextmanager
    def reading_ahead(self, names: Iterable[str]) -> Iterator[None]:
        """For the length of a `with`, a thread brings these tensors into the page cache, where the system keeps them as long as it can.

        It takes none of the process's memory, and whoever reads them then meets the errors that it meets.
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
        """The bytes of one tensor as they lie in the file, in pieces of 16 MiB.

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
                    raise InputError(info.file, "changed while it was being read.", tensor=name)
                left -= len(piece)
                yield piece


class _Under(Mapping[str, Tensor]):
    def __init__(self, source: Checkpoint, prefix: str, device: torch.device) -> None:
        self._source, self._prefix, self._device = source, prefix, device

    def __getitem__(self, name: str) -> Tensor:
        return self._source.read(self._prefix + name, device=self._device)

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._source.infos if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
