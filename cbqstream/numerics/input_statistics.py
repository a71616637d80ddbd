"""Statistics of the inputs of a linear layer.

Shapes: B batch, S sequence, T tokens, I input columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Sums and extremes of the inputs of a layer per column, and a sample of its tokens."""

    squares: Tensor
    """Sum of x^2, float64 [I]."""
    low: Tensor
    """Smallest value, float32 [I]."""
    high: Tensor
    """Largest value, float32 [I]."""
    sample: Tensor
    """Sampled tokens, float32 [T, I]."""
    tokens: int
    """Number of all tokens."""

    @classmethod
    def of(cls, x: Tensor, stride: int | None, before: int = 0) -> "InputStatistics":
        """Statistics of a batch [B, S, I] or [T, I].

        Args:
            x: inputs, any float dtype.
            stride: sample every `stride`-th token; None samples no tokens. Sampling starts at half a stride, because the first token is
                special in many models.
            before: number of tokens in earlier batches. If a batch has at most half a stride of tokens, as a batch of an expert may have,
                sampling continues the positions of the earlier batches.
        """
        rows = x.detach().flatten(0, -2).float()
        first = 0 if stride is None else stride // 2 if len(rows) > stride // 2 else (stride // 2 - before) % stride
        sample = rows.new_empty(0, rows.shape[1]) if stride is None else rows[first::stride].clone()
        squares = rows.square().sum(0, dtype=torch.float64)
        return cls(squares, rows.amin(0), rows.amax(0), sample, len(rows))

    @classmethod
    def none(cls, columns: int, device: torch.device) -> "InputStatistics":
        """Statistics of a layer without any input token."""
        zeros = torch.zeros(columns, device=device)
        return cls(zeros.double(), zeros, zeros, zeros.new_empty(0, columns), 0)

    def __add__(self, other: "InputStatistics") -> "InputStatistics":
        return InputStatistics(
            self.squares + other.squares,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            torch.cat([self.sample, other.sample]),
            self.tokens + other.tokens,
        )

    def divided(self, scale_I: Tensor) -> "InputStatistics":
        """Statistics of these inputs divided by a scale per column."""
        squares = self.squares / scale_I.double().square()
        return InputStatistics(squares, self.low / scale_I, self.high / scale_I, self.sample / scale_I, self.tokens)

    @property
    def second_moment(self) -> Tensor:
        """Mean square E[x^2] of the inputs per column, float32 [I]."""
        return (self.squares / self.tokens).float()


def sum_of(statistics: Sequence[InputStatistics]) -> InputStatistics:
    """Statistics of the tokens of several layers together; the inputs of all layers have the same columns."""
    total = reduce(add, (replace(found, sample=found.sample[:0]) for found in statistics))
    return replace(total, sample=torch.cat([found.sample for found in statistics]))
