"""The interface of an activation store, which holds one stream of hidden states at one boundary.

Shapes: N segments, S tokens in a segment, D hidden dimension.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cbqstream.disk import Measure, unmeasured


@dataclass(frozen=True, slots=True)
class StreamShape:
    """Shape and dtype of a stream: N tensors [S, D] of one dtype. Values beside hidden states may also be integers or bool."""

    num_segments: int
    """Number of segments, N."""
    seq_len: int
    """Tokens in a segment, S."""
    hidden_size: int
    """Size of a hidden state, D."""
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True, slots=True)
class StoredValue:
    """Values beside the hidden states: one tensor for each segment, stored as a matrix."""

    store: "ActivationStore"
    shape: tuple[int, ...]
    """Shape of the tensor of one segment."""


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Numbers of rows and columns with which a tensor of a shape is stored."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape) // max(rows, 1)


class ActivationStore(ABC):
    """Hidden states x_SD by segment number.

    A stored segment is read back bit for bit. Reading a segment that was not written raises an error.

    Args:
        shape: shape and dtype of the stream.
        measure: counts the time that is spent waiting for segments.
    """

    def __init__(self, shape: StreamShape, measure: Measure = unmeasured) -> None:
        self.shape = shape
        self.measure = measure
        self.beside: Mapping[str, StoredValue] = {}
        """Values of the same segments that depend only on their tokens, by key. Streams share them."""
        self.handed: dict[str, StoredValue] = {}
        """Values that the block before handed on with the hidden states, by key."""
        self._created: dict[tuple[str, tuple[int, ...], torch.dtype], StoredValue] = {}

    @abstractmethod
    def write(self, segment: int, x_SD: Tensor) -> None:
        """Store one segment in the dtype of the store, and overwrite an earlier value.

        Raises:
            IndexError: there is no such segment.
            ValueError: the shape is not [S, D].
        """

    @abstractmethod
    def read(self, segment: int) -> Tensor:
        """Read one segment: [S, D] on the CPU, in the dtype of the store.

        Raises:
            IndexError: there is no such segment.
            InputError: the segment was never written, or is damaged.
        """

    def hand_on(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> StoredValue:
        """The values of a key in `handed`; their store is created, unless there is one for this shape and dtype.

        Args:
            key: key of the values.
            shape: shape of the tensor of one segment.
            dtype: dtype of the tensors.
        """
        kind = key, tuple(shape), dtype
        if kind not in self._created:
            self._created[kind] = StoredValue(self._new_beside(key, shape, dtype), tuple(shape))
        self.handed[key] = self._created[kind]
        return self.handed[key]

    @abstractmethod
    def _new_beside(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> "ActivationStore":
        """Create a store for values that are handed on."""

    def _check(self, segment: int, x_SD: Tensor | None = None) -> None:
        if not 0 <= segment < self.shape.num_segments:
            raise IndexError(f"segment {segment} is outside a stream of {self.shape.num_segments} segments")
        expected = (self.shape.seq_len, self.shape.hidden_size)
        if x_SD is not None and tuple(x_SD.shape) != expected:
            raise ValueError(f"segment of shape {tuple(x_SD.shape)}, expected {expected}")
