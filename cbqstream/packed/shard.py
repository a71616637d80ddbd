"""Writing of safetensors files in pieces, so that tensors can be copied from another file without being in memory.

The bytes of a file depend only on its tensors: tensors are sorted by name, and the metadata is constant. Older versions of transformers
require the metadata.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cbqstream.checkpoint.header import DTYPES
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.tensors import ModelTensor, StoredTensors, TensorInfo
from cbqstream.disk import Disk, FileDigest
from cbqstream.runtime.offload import OffloadedTensor

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of a safetensors file, which is read when it is needed."""

    source: Checkpoint
    name: str

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.source.infos[self.name].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.source.infos[self.name].shape

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.source.infos[self.name].num_bytes

    def read(self) -> Tensor:
        """The tensor on the CPU."""
        return self.source.read(self.name, device=torch.device("cpu"))


LazyTensor = Tensor | OffloadedTensor | FileTensor
"""A tensor in memory, or one that is read when it is written."""


def write_tensors(disk: Disk, path: Path, tensors: Mapping[str, LazyTensor]) -> FileDigest:
    """Write tensors to a new, durable safetensors file, in the order of their names.

    Args:
        disk: used for the durable write.
        path: the file to write.
        tensors: values by name; one that is not in memory is read when it is written.

    Returns:
        Digest of the file.
    """
    names = sorted(tensors)

    def chunks() -> Iterator[bytes]:
        yield _header(
            [(name, _NAMES[tensors[name].dtype], list(tensors[name].shape), tensors[name].nbytes) for name in names]
        )
        for name in names:
            value = tensors[name]
            tensor = value if isinstance(value, Tensor) else value.read()
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return disk.write(path, chunks(), mode=0o666)


def copy_tensors(disk: Disk, path: Path, source: StoredTensors, tensors: Mapping[str, ModelTensor]) -> FileDigest:
    """Copy tensors from a checkpoint, byte for byte if they are not derived, into a new, durable safetensors file.

    Args:
        disk: used for the durable write.
        path: the file to write.
        source: the checkpoint.
        tensors: tensors of the checkpoint, by the names that they get.

    Returns:
        Digest of the file.
    """
    names = sorted(tensors)

    def chunks() -> Iterator[bytes]:
        yield _header([_entry(name, tensors[name]) for name in names])
        for name in names:
            yield from source.raw(tensors[name])

    return disk.write(path, chunks(), mode=0o666)


def _entry(name: str, info: ModelTensor) -> tuple[str, str, list[int], int]:
    """Name, dtype, shape and size in bytes of a tensor that is copied; a derived tensor is copied as it is computed."""
    if isinstance(info, TensorInfo):
        return name, info.stored_dtype, list(info.shape), info.num_bytes
    return name, _NAMES[info.dtype], list(info.shape), info.num_bytes


def _header(entries: list[tuple[str, str, list[int], int]]) -> bytes:
    """Header of a file whose tensors have the given names, dtypes, shapes and sizes in bytes, in the order of their data."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in entries:
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
