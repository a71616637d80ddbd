"""Lazy reading of tensors by name.

Each tensor is read with pread into memory of its own. Files are never mapped into memory, and neither a whole file nor the whole model is
read at once.
"""

import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cbqstream.checkpoint.folder import find_tensors
from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.tensors import ModelTensor, TensorInfo
from cbqstream.errors import InputError

_COPY_BYTES = 16 << 20
_SAMPLE_BYTES = 4 << 10


class Checkpoint:
    """Tensors of files that are read on demand.

    Args:
        infos: every tensor, by name. Derived tensors are computed from their parts when they are read.
        stored: location of every stored tensor, by its name in the files; by default, `infos` without its derived tensors.
    """

    def __init__(self, infos: Mapping[str, ModelTensor], stored: Mapping[str, TensorInfo] | None = None) -> None:
        self.infos = infos
        self.stored = (
            {name: info for name, info in infos.items() if isinstance(info, TensorInfo)} if stored is None else stored
        )
        """Location of every stored tensor, by its name in the files."""
        self._open: dict[Path, int] = {}
        self._by_file: dict[Path, list[TensorInfo]] = {}

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
            dtype: dtype of the result; by default, that of the tensor.

        Raises:
            InputError: the file changed or can no longer be read, the tensor has a dtype that is only copied, or the parts of a derived
                tensor have no valid meaning.
            KeyError: no tensor has this name.
        """
        tensor = self.value(self.infos[name])
        return tensor.to(device=device, dtype=dtype or tensor.dtype)

    def viewed(self, infos: Mapping[str, ModelTensor]) -> "Checkpoint":
        """Return the checkpoint with other tensors, which are derived from its own."""
        return Checkpoint(infos, self.stored)

    def value(self, info: ModelTensor) -> Tensor:
        """A tensor of the checkpoint or a part of one, on the CPU and in its dtype.

        Raises:
            InputError: see `read`.
        """
        if isinstance(info, TensorInfo):
            return self._read_stored(info)
        parts = {key: self.value(part) for key, part in info.parts.items()}
        try:
            return info.make(parts)
        except ValueError as error:
            raise InputError(
                info.file, f"{error}. Download it again, or repair the model.", tensor=info.name
            ) from error

    def _read_stored(self, info: TensorInfo, use: Callable[[memoryview], None] = lambda piece: None) -> Tensor:
        """One stored tensor, or a piece of one, on the CPU; `use` is called with each piece of 16 MiB."""
        dtype, values = info.dtype, torch.empty(info.num_bytes, dtype=torch.uint8)
        try:
            filled = _fill(values.numpy().data, self._opened(info.file), info.start, use)
        except OSError as error:
            raise InputError(
                info.file, f"cannot be read: {error.strerror}. Restore the file.", tensor=info.name
            ) from error
        if not filled:
            raise _changed(info)
        return values.view(dtype).reshape(info.shape)

    def _opened(self, path: Path) -> int:
        """Descriptor of a file, which is opened once; its header must be the one that was read first.

        Raises:
            InputError: the header changed.
        """
        if path not in self._open:
            if not self._by_file:
                for info in self.stored.values():
                    self._by_file.setdefault(info.file, []).append(info)
            held = read_header(path)
            for info in self._by_file.get(path, ()):
                if held.get(info.name) != info:
                    raise _changed(info)
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._open[path])
        return self._open[path]

    def under(self, prefix: str, device: torch.device) -> Mapping[str, Tensor]:
        """The tensors whose names begin with `prefix`, by the rest of their names; each access reads a tensor."""
        return _PrefixedTensors(self, prefix, device)

    def fingerprint(self) -> str:
        """SHA-256 in hex of the names, dtypes and shapes of the stored tensors, and of 4 KiB at the start, the middle and the end of each.

        Reading every byte of a large model would take minutes. The sample detects a model from another training run, because training
        changes every tensor.
        """
        digest = hashlib.sha256()
        for name in sorted(self.stored):
            info = self.stored[name]
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
                for info in (part for name in names for part in self.infos[name].stored):
                    for _ in _pieces(info):
                        if stopped.is_set():
                            return

        thread = threading.Thread(target=load, name="weights-ahead", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()

    def raw(self, info: ModelTensor) -> Iterator[bytes]:
        """Yield the bytes of one tensor in pieces of 16 MiB: as they are stored in the file, or of the computed tensor if it is derived.

        Raises:
            InputError: the file became shorter, or a derived tensor cannot be computed.
        """
        if isinstance(info, TensorInfo):
            yield from _pieces(info)
        else:
            values = self.value(info).contiguous().flatten().view(torch.uint8)
            yield from (piece.numpy().tobytes() for piece in torch.split(values, _COPY_BYTES))


def _pieces(info: TensorInfo) -> Iterator[bytes]:
    """Bytes of a stored tensor, in pieces of 16 MiB."""
    with info.file.open("rb") as file:
        file.seek(info.start)
        left = info.num_bytes
        while left:
            piece = file.read(min(left, _COPY_BYTES))
            if not piece:
                raise _changed(info)
            left -= len(piece)
            yield piece


def _fill(buffer: memoryview, file: int, offset: int, use: Callable[[memoryview], None]) -> bool:
    """Fill a buffer with the bytes of an open file from `offset` on; False if the file ends before. `use` is called with each piece."""
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done : done + _COPY_BYTES]], offset + done)
        if not count:
            return False
        use(buffer[done : done + count])
        done += count
    return True


def _changed(info: TensorInfo) -> InputError:
    return InputError(info.file, "changed while it was being read. Restore the file.", tensor=info.name)


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
