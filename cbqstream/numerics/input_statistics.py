"""Statistics of the inputs of a linear layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Of the inputs of a layer, per column: sum of squares (float64), smallest and largest value (float32) [I], and some tokens [T, I]."""

    squares: Tensor
    low: Tensor
    high: Tensor
    sample: Tensor
    tokens: int

    @classmethod
    def of(cls, x: Tensor, stride: int | None, before: int = 0) -> "InputStatistics":
        """Of a batch [B, S, I] or [T, I]; every `stride`-th token is sampled, not the first, which is special in many models.

        Where batches are so short that they would have none, as those of an expert may be, `before` tokens count that came before.
        """
        rows = x.detach().flatten(0, -2).float()
        first = 0 if stride is None else stride // 2 if len(rows) > stride // 2 else (stride // 2 - before) % stride
        sample = rows.new_empty(0, rows.shape[1]) if stride is None else rows[first::stride].clone()
        return cls(rows.square().sum(0, dtype=torch.float64), rows.amin(0), rows.amax(0), sample, len(rows))

    def __add__(self, other: "InputStatistics") -> "InputStatistics":
        return InputStatistics(
            self.squares + other.squares,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            torch.cat([self.sample, other.sample]),
            self.tokens + other.tokens,
        )

    def divided(self, scale_I: Tensor) -> "InputStatistics":
        """What they would be had the inputs been divided by a scale per column."""
        squares = self.squares / scale_I.double().square()
        return InputStatistics(squares, self.low / scale_I, self.high / scale_I, self.sample / scale_I, self.tokens)

    @property
    def second_moment(self) -> Tensor:
        """E[x^2], float32 [I]."""
        return (self.squares / self.tokens).float()


def sum_of(statistics: Sequence[InputStatistics]) -> InputStatistics:
    """Of several layers that read the same kind of inputs."""
    total = reduce(add, (replace(found, sample=found.sample[:0]) for found in statistics))
    return replace(total, sample=torch.cat([found.sample for found in statistics]))
