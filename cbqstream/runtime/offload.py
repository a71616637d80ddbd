"""Tensors that lie in a file while nothing is computed with them, for windows whose layers do not fit in memory together.

Weights that are read lazily are at home on disk too, but a layer that learns also has values that change. All of them lie in a file,
from where they are placed on the device for as long as they are used. They come back bit for bit, so it changes no result.
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
_READS_A_TRIM = 16


@dataclass(frozen=True, slots=True)
class OffloadedTensor:
    """Where a tensor lies."""

    file: ScratchFile
    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    """On which it is used."""

    @classmethod
    def of(cls, tensor: Tensor, file: ScratchFile) -> Self:
        """Write a tensor to the end of a file."""
        return cls(file, file.append(_bytes_of(tensor)), tensor.shape, tensor.dtype, tensor.device)

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return self.shape.numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        if self.file.reads % _READS_A_TRIM == 0:
            trim_heap()  # layers that come and go leave holes
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.file.read(self.start, _bytes_of(tensor))
        return tensor.to(self.device)

    def write(self, tensor: Tensor) -> None:
        """Replace what lies there."""
        self.file.write(self.start, _bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU; of others that of a copy."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


class Offloadable(nn.Module):
    """A module with tensors of the size of a weight, which are on the meta device while they lie in a file and are not placed."""

    large: ClassVar[tuple[str, ...]] = ("weight",)
    """Names of these tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._pages: dict[str, OffloadedTensor] = {}
        self._is_placed = False

    def offload(self, file: ScratchFile) -> None:
        """Move the large tensors into a file."""
        self._move(file, {})

    def offload_beside(self, other: "Offloadable") -> None:
        """The same where another module has done it, and into its file; tensors that both have are not written again."""
        pages = other._pages.values()
        if pages:
            self._move(next(iter(pages)).file, {id(getattr(other, name)): page for name, page in other._pages.items()})

    def _move(self, file: ScratchFile, known: Mapping[int, OffloadedTensor]) -> None:
        for name in self.large:
            tensor: Tensor = getattr(self, name)
            self._pages[name] = known.get(id(tensor)) or OffloadedTensor.of(tensor, file)
            setattr(self, name, tensor.to(_META))

    def put(self, name: str, tensor: Tensor) -> None:
        """Another tensor in the place of a large one, which is let go."""
        if name in self._pages:
            self._pages[name] = OffloadedTensor.of(tensor, self._pages[name].file)
            tensor = tensor.to(_META)
        setattr(self, name, tensor)

    def page(self, name: str) -> OffloadedTensor | None:
        """Where a large tensor lies; None if it stays in memory."""
        return self._pages.get(name)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """For the length of a `with` the large tensors are in memory. What torch changes in them in place stays changed."""
        if self._is_placed or not self._pages:
            yield
            return
        tensors = {name: page.read() for name, page in self._pages.items()}
        versions = {name: tensor._version for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self._is_placed = True
        try:
            yield
            for name, page in self._pages.items():
                if getattr(self, name) is not tensors[name]:
                    raise RuntimeError(f"{name} was assigned while it was placed, which `put` is for")
                if tensors[name]._version != versions[name]:
                    page.write(tensors[name])
        finally:
            self._is_placed = False
            for name in self._pages:
                setattr(self, name, tensors[name].to(_META))
