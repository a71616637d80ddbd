"""Products with a weight that is computed one slab at a time, so that its memory does not grow with the layer.

A slab is a slice of the rows of a weight. The slabs of a weight are about equally large and have multiples of 256 rows, because matrix
products on CUDA are several times slower where the number of rows is not a multiple of 8.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

SLAB_WEIGHTS = 1 << 26
"""Largest number of weights in a slab; in most models up to 7B, each layer is a single slab."""


_ALIGNED = 256
"""Number of rows of which every slab but the last has a multiple, unless a slab has fewer rows."""


def slabs(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of the rows of a weight with shape [O, I], one per slab."""
    most = max(1, SLAB_WEIGHTS // shape[1])
    step = _ALIGNED if most >= _ALIGNED else 1
    number = -(-shape[0] // (most // step * step)) if shape[0] > most else 1
    rows = shape[0] if number == 1 else -(-shape[0] // (number * step)) * step
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def in_slabs(shape: Sequence[int]) -> bool:
    """Whether a weight with shape [O, I] is divided into more than one slab."""
    return len(list(slabs(shape))) > 1


def linear_in_slabs(x: Tensor, shape: Sequence[int], make: Callable[[slice], Tensor], bias: Tensor | None) -> Tensor:
    """`x @ w^T + bias`, [..., O], with a weight w that is computed slab by slab.

    Args:
        x: inputs [..., I].
        shape: shape of w, [O, I].
        make: returns the given rows of w. It may return the same memory every time.
        bias: [O], or None.
    """
    parts = list(slabs(shape))
    if len(parts) == 1:
        return functional.linear(x, make(parts[0]), bias)
    y = x.new_empty(*x.shape[:-1], shape[0])
    x_TI, y_TO = x.reshape(-1, shape[1]), y.view(-1, shape[0])
    for rows in parts:
        w_OI, part = make(rows), None if bias is None else bias[rows]
        if torch.is_grad_enabled():  # then autograd refuses `out`
            y[..., rows] = functional.linear(x, w_OI, part)
        elif part is None:
            torch.mm(x_TI, w_OI.t(), out=y_TO[:, rows])
        else:
            torch.addmm(part, x_TI, w_OI.t(), out=y_TO[:, rows])
    return y
