"""The interface of an activation store, which holds one stream of hidden states at one boundary.

Shapes: N segments, S tokens in a segment, D hidden dimension.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
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
        self.beside: Mapping[str, ActivationStore] = {}
        """Stores of further values of the same segments, which blocks read with the hidden states, by key."""

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

    def _check(self, segment: int, x_SD: Tensor | None = None) -> None:
        if not 0 <= segment < self.shape.num_segments:
            raise IndexError(f"segment {segment} is outside a stream of {self.shape.num_segments} segments")
        expected = (self.shape.seq_len, self.shape.hidden_size)
        if x_SD is not None and tuple(x_SD.shape) != expected:
            raise ValueError(f"segment of shape {tuple(x_SD.shape)}, expected {expected}")
