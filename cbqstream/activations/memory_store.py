"""Activations in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cbqstream.activations.store import ActivationStore, StreamShape, as_matrix
from cbqstream.errors import InputError


class MemoryStore(ActivationStore):
    """An activation store that keeps every segment in memory.

    All segments are parts of one tensor. Tensors of a few MiB would lie on the heap between those of the computation, and fragment it.
    """

    def __init__(self, shape: StreamShape) -> None:
        super().__init__(shape)
        # the system provides the memory of a segment when it is written
        self._values_NSD = torch.empty(shape.num_segments, shape.seq_len, shape.hidden_size, dtype=shape.dtype)
        self._written = set[int]()

    def write(self, segment: int, x_SD: Tensor) -> None:
        """Store a copy of one segment. See `ActivationStore.write`."""
        self._check(segment, x_SD)
        self._values_NSD[segment] = x_SD.detach().to("cpu", self.shape.dtype)
        self._written.add(segment)

    def holds(self, segment: int) -> bool:
        """Whether a segment was written."""
        return segment in self._written

    def read(self, segment: int) -> Tensor:
        """Return a copy of one segment. See `ActivationStore.read`."""
        self._check(segment)
        if segment not in self._written:
            raise InputError("memory", f"segment {segment} was never written.")
        return self._values_NSD[segment].clone()

    def _new_beside(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> "MemoryStore":
        return MemoryStore(StreamShape(self.shape.num_segments, *as_matrix(shape), dtype))
