"""Products with a weight that is made some rows at a time, so that memory for it does not grow with the layer."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor
from torch.nn import functional

SLAB_WEIGHTS = 1 << 26
"""At most, in a slab; the layers of most models up to 7B are one."""


def slabs(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of rows of a weight [O, I]."""
    rows = max(1, SLAB_WEIGHTS // shape[1])
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def in_slabs(shape: Sequence[int]) -> bool:
    """Whether a weight [O, I] is more than one."""
    return len(list(slabs(shape))) > 1


def linear_in_slabs(x: Tensor, shape: Sequence[int], make: Callable[[slice], Tensor], bias: Tensor | None) -> Tensor:
    """`x @ w^T + bias`, [..., O], where `make` gives some rows of w [O, I], each time in the same memory if it likes."""
    parts = list(slabs(shape))
    if len(parts) == 1:
        return functional.linear(x, make(parts[0]), bias)
    y = x.new_empty(*x.shape[:-1], shape[0])
    for rows in parts:
        y[..., rows] = functional.linear(x, make(rows), None if bias is None else bias[rows])
    return y
