"""The product of a linear layer with a weight that is made for it, and made again in the backward pass instead of kept.

Such a weight is as large as the layer and cheap beside its products; those of a window would be most of its memory. What it is made of does
not change in between, so both times give the same bits. Its gradient is used up at once, and so is not kept either. A large weight is made
in slabs of rows, so that memory for it does not grow with the layer.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from cbqstream.config import Scheme
from cbqstream.numerics.affine import grouped, nearest_levels, row_tiles
from cbqstream.numerics.slabs import linear_in_slabs, slabs
from cbqstream.runtime.scratch import Scratch


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

    def levels(self, parameters: Sequence[Tensor], scale_OG: Tensor) -> Tensor:
        """Levels q - z of the hard weight with stored scales, float32 [O, G, K]."""
        ...

    def gradients(self, parameters: Sequence[Tensor], gradient_OI: Tensor) -> tuple[Tensor, ...]:
        """Of every parameter, from that of w_hat. What has no gradient of its own may be moved here."""
        ...


Place = Callable[[], AbstractContextManager[LearnedWeight]]
"""Gives a weight that is in memory for the length of a `with`."""


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Place, bias: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.place = place
        with place() as weight:

            def make(rows: slice) -> Tensor:
                return weight.part(rows).soft(parameters_of(weight, parameters, rows), x.dtype)

            return linear_in_slabs(x, weight.weight.shape, make, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        g_TO, x_TI = gradients[0].flatten(0, -2), x.flatten(0, -2)
        gradient_x: Tensor | None = None
        found: list[tuple[Tensor, ...]] = []
        with ctx.place() as weight:
            for rows in slabs(weight.weight.shape):
                part, own, g = weight.part(rows), parameters_of(weight, parameters, rows), g_TO[:, rows]
                if ctx.needs_input_grad[0]:  # before anything moves
                    w_hat = part.soft(own, x.dtype)
                    gradient_x = torch.mm(g, w_hat) if gradient_x is None else gradient_x.addmm_(g, w_hat)
                if any(ctx.needs_input_grad[3:]):
                    gradient = weight.scratch.take("gradient", part.weight.shape, x.dtype, x.device)
                    found.append(part.gradients(own, torch.mm(g.t(), x_TI, out=gradient)))
        joined: list[Tensor | None] = [
            of_slabs[0] if len(of_slabs) == 1 else torch.cat(of_slabs) if by_rows else torch.stack(of_slabs).sum(0)
            for by_rows, of_slabs in zip(weight.by_rows if found else (), zip(*found, strict=True), strict=True)
        ] or [None] * len(parameters)
        return None if gradient_x is None else gradient_x.view(x.shape), None, None, *joined


def parameters_of(weight: LearnedWeight, parameters: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """The parameters of some rows of a weight, from those of all."""
    return [value[rows] if by_rows else value for by_rows, value in zip(weight.by_rows, parameters, strict=True)]


def learned_product(x: Tensor, place: Place, bias: Tensor | None, *parameters: Tensor) -> Tensor:
    """`x @ w_hat^T + bias`, [..., O] in the dtype of x [..., I]; differentiable in x and the parameters. The weight is placed here,
    and again in the backward pass."""
    product: Tensor = _Product.apply(x, place, bias, *parameters)  # type: ignore[no-untyped-call]
    return product


@dataclass(frozen=True, slots=True)
class Nearest:
    """A weight rounded to nearest; the step sizes that its codes are multiplied by may learn."""

    weight: Tensor
    """w [O, I], any float dtype."""
    scale0: Tensor
    """s0, float32 [O, G]."""
    zero_point: Tensor | None
    """z, int8 [O, G]; None if symmetric."""
    scheme: Scheme
    scratch: Scratch

    by_rows: ClassVar[tuple[bool, ...]] = (True,)

    def part(self, rows: slice) -> Self:
        """See `LearnedWeight`."""
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return replace(self, weight=self.weight[rows], scale0=self.scale0[rows], zero_point=zero_point)

    def soft(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """See `LearnedWeight`; the one parameter is theta [O, G]."""
        (theta_OG,) = parameters
        scale_OG1 = (self.scale0 * theta_OG.exp()).unsqueeze(-1)
        w_hat = self.scratch.take("weight", self.weight.shape, dtype, self.weight.device)
        for rows in row_tiles(self.weight):
            levels = self.part(rows).levels(parameters, self.scale0[rows])
            torch.mul(levels, scale_OG1[rows], out=grouped(w_hat[rows], scale_OG1.shape[1]))
        return w_hat

    def levels(self, parameters: Sequence[Tensor], scale_OG: Tensor) -> Tensor:
        """See `LearnedWeight`."""
        return nearest_levels(self.weight, scale_OG, self.zero_point, self.scheme)

    def gradients(self, parameters: Sequence[Tensor], gradient_OI: Tensor) -> tuple[Tensor, ...]:
        """See `LearnedWeight`; d w_hat / d theta = w_hat."""
        w_hat = self.soft(parameters, torch.float32)
        return (grouped(w_hat * gradient_OI, self.scale0.shape[1]).sum(-1),)
