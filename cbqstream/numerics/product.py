"""The product of a linear layer with a weight that is learned, and computed again in the backward pass instead of kept.

Such a weight is as large as the layer and cheap beside its products; those of a window would be most of its memory. What it is made of does
not change in between, so both times give the same bits. Its gradient is used up at once, and so is not kept either.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from cbqstream.numerics.scratch import Scratch


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
        return functional.linear(x, weight.soft(parameters, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, *parameters), weight = ctx.saved_tensors, ctx.weight
        g_TO, x_TI = gradients[0].flatten(0, -2), x.flatten(0, -2)
        gradient_x = None
        if ctx.needs_input_grad[0]:  # before anything moves
            gradient_x = torch.mm(g_TO, weight.soft(parameters, x.dtype)).view(x.shape)
        gradient_OI = weight.scratch.take("gradient", weight.weight.shape, x.dtype, x.device)
        torch.mm(g_TO.t(), x_TI, out=gradient_OI)
        return gradient_x, None, None, *weight.gradients(parameters, gradient_OI)


def learned_product(x: Tensor, weight: LearnedWeight, bias: Tensor | None, *parameters: Tensor) -> Tensor:
    """`x @ w_hat^T + bias`, [..., O] in the dtype of x [..., I]; differentiable in x and the parameters."""
    product: Tensor = _Product.apply(x, weight, bias, *parameters)  # type: ignore[no-untyped-call]
    return product
