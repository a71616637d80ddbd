"""The interface of an activation store: one stream of hidden states at one boundary. N segments, S tokens, D hidden."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StreamShape:
    """What a store holds: `num_segments` tensors [S, D] of one dtype (bfloat16, float16 or float32)."""

    num_segments: int
    seq_len: int
    hidden_size: int
    dtype: torch.dtype = torch.bfloat16


class ActivationStore(ABC):
    """Hidden states x_SD by segment number. What was written is read back bit for bit; what was not written is an error."""

    def __init__(self, shape: StreamShape) -> None:
        self.shape = shape
        self.waited = 0.0
        """Seconds that `read_batches` has waited for segments so far."""
        self.hidden = 0.0
        """Seconds of writing that `write_behind` has not waited for so far."""

    def writing(self) -> float:
        """Seconds that the disk has taken so far, for whoever measures what writing takes."""
        return 0.0

    @abstractmethod
    def write(self, segment: int, x_SD: Tensor) -> None:
        """Store one segment, converted to the dtype of the store. Overwrites.

        Raises:
            IndexError: there is no such segment.
            ValueError: the shape is not [S, D].
        """

    @abstractmethod
    def read(self, segment: int) -> Tensor:
        """One segment, [S, D] on the CPU, in the dtype of the store.

        Raises:
            IndexError: there is no such segment.
            InputError: it was never written, or is damaged.
        """

    def _check(self, segment: int, x_SD: Tensor | None = None) -> None:
        if not 0 <= segment < self.shape.num_segments:
            raise IndexError(f"segment {segment} of {self.shape.num_segments}")
        expected = (self.shape.seq_len, self.shape.hidden_size)
        if x_SD is not None and tuple(x_SD.shape) != expected:
            raise ValueError(f"segment of shape {tuple(x_SD.shape)}, expected {expected}")
