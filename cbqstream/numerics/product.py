"""The product of a linear layer with a weight that is made for it, and made again in the backward pass instead of kept.

Such a weight is as large as the layer and cheap beside its products; those of a window would be most of its memory. What it is made of does
not change in between, so both times give the same bits. Its gradient is used up at once, and so is not kept either. A large weight is made
in slabs of rows, so that memory for it does not grow with the layer.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from cbqstream.numerics.scratch import Scratch

SLAB_WEIGHTS = 1 << 26
"""At most, in a slab; the layers of most models up to 7B are one."""


def slabs(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of rows of a weight [O, I]."""
    rows = max(1, SLAB_WEIGHTS // shape[1])
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def linear_in_slabs(x: Tensor, shape: Sequence[int], make: Callable[[slice], Tensor], bias: Tensor | None) -> Tensor:
    """`x @ w^T + bias`, [..., O], where `make` gives some rows of w [O, I], each time in the same memory if it likes."""
    parts = list(slabs(shape))
    if len(parts) == 1:
        return functional.linear(x, make(parts[0]), bias)
    y = x.new_empty(*x.shape[:-1], shape[0])
    for rows in parts:
        y[..., rows] = functional.linear(x, make(rows), None if bias is None else bias[rows])
    return y


class LearnedWeight(Protocol):
    """A weight [O, I] that is a function of some parameters."""

    @property
    def weight(self) -> Tensor:
        """What it is learned from, [O, I]."""
        ...

    @property
    def scratch(self) -> Scratch:
        """Where weights and their gradients lie for a moment."""
        ...

    @property
    def by_rows(self) -> Sequence[bool]:
        """Of each parameter, whether it has a row for each row of the weight, or belongs to all."""
        ...

    def part(self, rows: slice) -> Self:
        """Some rows of it."""
        ...

    def soft(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """w_hat [O, I] in `dtype`, in memory that the next one uses again."""
        ...

    def gradients(self, parameters: Sequence[Tensor], gradient_OI: Tensor) -> tuple[Tensor, ...]:
        """Of every parameter, from that of w_hat. What has no gradient of its own may be moved here."""
        ...


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: LearnedWeight, bias: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.weight = weight

        def make(rows: slice) -> Tensor:
            return weight.part(rows).soft(_rows(weight, parameters, rows), x.dtype)

        return linear_in_slabs(x, weight.weight.shape, make, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, *parameters), weight = ctx.saved_tensors, ctx.weight
        g_TO, x_TI = gradients[0].flatten(0, -2), x.flatten(0, -2)
        gradient_x: Tensor | None = None
        found: list[tuple[Tensor, ...]] = []
        for rows in slabs(weight.weight.shape):
            part, own, g = weight.part(rows), _rows(weight, parameters, rows), g_TO[:, rows]
            if ctx.needs_input_grad[0]:  # before anything moves
                w_hat = part.soft(own, x.dtype)
                gradient_x = torch.mm(g, w_hat) if gradient_x is None else gradient_x.addmm_(g, w_hat)
            gradient = weight.scratch.take("gradient", part.weight.shape, x.dtype, x.device)
            found.append(part.gradients(own, torch.mm(g.t(), x_TI, out=gradient)))
        joined = [
            of_slabs[0] if len(of_slabs) == 1 else torch.cat(of_slabs) if by_rows else torch.stack(of_slabs).sum(0)
            for by_rows, of_slabs in zip(weight.by_rows, zip(*found, strict=True), strict=True)
        ]
        return None if gradient_x is None else gradient_x.view(x.shape), None, None, *joined


def _rows(weight: LearnedWeight, parameters: Sequence[Tensor], rows: slice) -> list[Tensor]:
    return [value[rows] if by_rows else value for by_rows, value in zip(weight.by_rows, parameters, strict=True)]


def learned_product(x: Tensor, weight: LearnedWeight, bias: Tensor | None, *parameters: Tensor) -> Tensor:
    """`x @ w_hat^T + bias`, [..., O] in the dtype of x [..., I]; differentiable in x and the parameters."""
    product: Tensor = _Product.apply(x, weight, bias, *parameters)  # type: ignore[no-untyped-call]
    return product
