"""Tensors that are kept in a file while nothing is computed with them, for windows whose layers do not fit in memory together.

Weights are read lazily from the checkpoint, but a layer that is trained has values that change as well. All of them are offloaded to one
scratch file and placed on the device while they are used. They are restored bit for bit, so offloading changes no result.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from cbqstream.disk import ScratchFile
from cbqstream.runtime.memory import trim_heap

_META = torch.device("meta")
_READS_PER_TRIM = 16


@dataclass(frozen=True, slots=True)
class OffloadedTensor:
    """A tensor in a scratch file."""

    file: ScratchFile
    start: int
    """Offset of the first byte."""
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    """Device on which the tensor is used."""

    @classmethod
    def of(cls, tensor: Tensor, file: ScratchFile) -> Self:
        """Write a tensor to the end of a file."""
        return cls(file, file.append(_bytes_of(tensor)), tensor.shape, tensor.dtype, tensor.device)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.shape.numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor on its device, in memory of its own."""
        if self.file.reads % _READS_PER_TRIM == 0:
            trim_heap()  # layers that come and go fragment the heap
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.file.read(self.start, _bytes_of(tensor))
        return tensor.to(self.device)

    def write(self, tensor: Tensor) -> None:
        """Overwrite the stored values."""
        self.file.write(self.start, _bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> memoryview:
    """Memory of a contiguous tensor on the CPU; of any other tensor, the memory of a copy."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


class Offloadable(nn.Module):
    """A module with large tensors that can be offloaded. An offloaded tensor is on the meta device unless it is placed."""

    large: ClassVar[tuple[str, ...]] = ("weight",)
    """Names of the tensors that can be offloaded."""

    def __init__(self) -> None:
        super().__init__()
        self._offloaded: dict[str, OffloadedTensor] = {}
        self._is_placed = False

    def offload(self, file: ScratchFile) -> None:
        """Move the large tensors into a file."""
        self._move(file, {})

    def offload_beside(self, other: "Offloadable") -> None:
        """Move the large tensors into the file of another offloaded module; tensors that both share are not written again.

        Does nothing if the other module is not offloaded.
        """
        stored = other._offloaded.values()
        if stored:
            known = {id(getattr(other, name)): tensor for name, tensor in other._offloaded.items()}
            self._move(next(iter(stored)).file, known)

    def _move(self, file: ScratchFile, known: Mapping[int, OffloadedTensor]) -> None:
        for name in self.large:
            tensor: Tensor = getattr(self, name)
            self._offloaded[name] = known.get(id(tensor)) or OffloadedTensor.of(tensor, file)
            setattr(self, name, tensor.to(_META))

    def put(self, name: str, tensor: Tensor) -> None:
        """Replace a large tensor."""
        if name in self._offloaded:
            self._offloaded[name] = OffloadedTensor.of(tensor, self._offloaded[name].file)
            tensor = tensor.to(_META)
        setattr(self, name, tensor)

    def offloaded(self, name: str) -> OffloadedTensor | None:
        """A large tensor in its file; None if it is kept in memory."""
        return self._offloaded.get(name)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Keep the large tensors in memory inside a `with`. In-place changes are written back to the file at its end."""
        if self._is_placed or not self._offloaded:
            yield
            return
        tensors = {name: stored.read() for name, stored in self._offloaded.items()}
        versions = {name: tensor._version for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self._is_placed = True
        try:
            yield
            for name, stored in self._offloaded.items():
                if getattr(self, name) is not tensors[name]:
                    raise RuntimeError(f"{name} was assigned while it was placed; use `put`")
                if tensors[name]._version != versions[name]:
                    stored.write(tensors[name])
        finally:
            self._is_placed = False
            for name in self._offloaded:
                setattr(self, name, tensors[name].to(_META))
