"""Facts about the values that the blocks of a model hand each other, which a trial of its code finds."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Handover:
    """Sizes and kinds of the values that the blocks of a model hand each other."""

    width: int
    """Width D of the hidden states of a token."""
    repeated: tuple[str, ...] = ()
    """Names of arguments, such as masks, that blocks want with the number of segments as the first dimension."""
    token_bytes: int = 0
    """Size of the arguments of all blocks that depend on the tokens, in bytes per token."""
    counts_positions: bool = False
    """Whether the model has to count the positions itself, because it does not count them from 0."""
    kept: tuple[frozenset[str], ...] = ()
    """Keys of the values that each block hands on and that a later block reads; empty if there are none."""
    handed_bytes: float = 0.0
    """Largest size of these values for a segment with one token, in bytes."""
    handed_growth: float = 0.0
    """Power of the number of tokens with which their size grows: 1 for keys, at most 2 for indices of tokens."""

    def bytes_of_segment(self, tokens: int) -> int:
        """Upper bound of the size of the values that a block hands on for a segment, in bytes."""
        return math.ceil(self.handed_bytes * math.pow(tokens, self.handed_growth))
