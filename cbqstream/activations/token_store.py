"""Hidden states of all tokens, of which segments or any tokens can be read and changed, in memory or in a scratch file."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from cbqstream.activations.store import ActivationStore, StreamShape, as_matrix
from cbqstream.disk import ScratchFile
from cbqstream.errors import InputError


class TokenStore(ActivationStore):
    """An activation store that also reads and changes single tokens. Token t is token `t % S` of segment `t // S`.

    Args:
        shape: shape and dtype of the stream.
        file: file of the values; None keeps them in memory.
        zeros: whether all values are zero at the start; otherwise a segment must be written before it is read.
    """

    def __init__(self, shape: StreamShape, file: ScratchFile | None = None, *, zeros: bool = False) -> None:
        super().__init__(shape)
        tokens, itemsize = shape.num_segments * shape.seq_len, shape.dtype.itemsize
        self._file = file
        self._start = 0 if file is None else file.reserve(tokens * shape.hidden_size * itemsize)
        self._rows = torch.zeros(tokens if file is None else 0, shape.hidden_size, dtype=shape.dtype)
        self._written = set(range(shape.num_segments)) if zeros else set[int]()

    @override
    def write(self, segment: int, x_SD: Tensor) -> None:
        self._check(segment, x_SD)
        self._put(segment * self.shape.seq_len, x_SD.detach().to("cpu", self.shape.dtype))
        self._written.add(segment)

    @override
    def read(self, segment: int) -> Tensor:
        self._check(segment)
        if segment not in self._written:
            raise InputError("memory", f"segment {segment} was never written.")
        first = segment * self.shape.seq_len
        return self._get(first, first + self.shape.seq_len)

    def take(self, tokens: Tensor) -> Tensor:
        """Values [T, D] of T tokens, on the CPU, in the dtype of the store.

        Args:
            tokens: numbers of the tokens, int64 [T], ascending.
        """
        if self._file is None:
            return self._rows[tokens]
        parts = [self._get(first, stop) for first, stop in _ranges(tokens)]
        return torch.cat(parts) if parts else self._rows

    def add(self, tokens: Tensor, values_TD: Tensor) -> None:
        """Add values [T, D] to tokens. The sum is computed in float32.

        Args:
            tokens: numbers of the tokens, int64 [T], ascending and different from each other.
            values_TD: what is added.
        """
        self.replace(tokens, self.take(tokens).float() + values_TD.detach().float().cpu())

    def replace(self, tokens: Tensor, values_TD: Tensor) -> None:
        """Replace the values [T, D] of tokens.

        Args:
            tokens: numbers of the tokens, int64 [T], ascending and different from each other.
            values_TD: the new values.
        """
        values = values_TD.detach().to("cpu", self.shape.dtype)
        if self._file is None:
            self._rows[tokens] = values
            return
        position = 0
        for first, stop in _ranges(tokens):
            self._put(first, values[position : position + stop - first])
            position += stop - first

    def _get(self, first: int, stop: int) -> Tensor:
        """Copy of the values of tokens `first` to `stop - 1`."""
        if self._file is None:
            return self._rows[first:stop].clone()
        values = torch.empty(stop - first, self.shape.hidden_size, dtype=self.shape.dtype)
        self._file.read(self._offset(first), values.view(torch.uint8).numpy().data)
        return values

    def _put(self, first: int, values: Tensor) -> None:
        if self._file is None:
            self._rows[first : first + len(values)] = values
        else:
            self._file.write(self._offset(first), values.contiguous().view(torch.uint8).numpy().data)

    def _offset(self, token: int) -> int:
        return self._start + token * self.shape.hidden_size * self.shape.dtype.itemsize

    def _new_beside(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> "TokenStore":
        return TokenStore(StreamShape(self.shape.num_segments, *as_matrix(shape), dtype), self._file)


def _ranges(tokens: Tensor) -> list[tuple[int, int]]:
    """Ranges of consecutive numbers in ascending ones, each as its first number and the number behind its last."""
    if not len(tokens):
        return []
    cuts = (tokens[1:] != tokens[:-1] + 1).nonzero().flatten()
    firsts = torch.cat([tokens[:1], tokens[cuts + 1]]).tolist()
    lasts = torch.cat([tokens[cuts], tokens[-1:]]).tolist()
    return [(first, last + 1) for first, last in zip(firsts, lasts, strict=True)]
