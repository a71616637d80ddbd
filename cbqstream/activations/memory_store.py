"""Activations in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cbqstream.activations.store import ActivationStore, StreamShape, as_matrix
from cbqstream.errors import InputError


class MemoryStore(ActivationStore):
    """An activation store that keeps every segment in memory."""

    def __init__(self, shape: StreamShape) -> None:
        super().__init__(shape)
        self._segments: dict[int, Tensor] = {}

    def write(self, segment: int, x_SD: Tensor) -> None:
        """Store a copy of one segment. See `ActivationStore.write`."""
        self._check(segment, x_SD)
        self._segments[segment] = x_SD.detach().to("cpu", self.shape.dtype, copy=True)

    def holds(self, segment: int) -> bool:
        """Whether a segment was written."""
        return segment in self._segments

    def read(self, segment: int) -> Tensor:
        """Return a copy of one segment. See `ActivationStore.read`."""
        self._check(segment)
        if segment not in self._segments:
            raise InputError("memory", f"segment {segment} was never written.")
        return self._segments[segment].clone()

    def _new_beside(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> "MemoryStore":
        return MemoryStore(StreamShape(self.shape.num_segments, *as_matrix(shape), dtype))
