"""Facts about the values that the blocks of a model hand each other, which a trial of its code finds."""

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
    kept: tuple[frozenset[str], ...] = ()
    """Keys of the values that each block hands on and that a later block reads; empty if there are none."""
