"""The product of a linear layer with a soft weight that is made when it is needed, and made again in the backward pass.

A soft weight is as large as the layer and cheap beside the layer's products; kept, the soft weights of a window would be most of its
memory. Its parameters do not change between the two passes, so both give the same bits. Its gradient is used at once and not kept either.
A large weight is made in slabs of rows, so memory for it does not grow with the layer.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from cbqstream.numerics.slabs import linear_in_slabs, slabs
from cbqstream.runtime.scratch import Scratch


class SoftWeight(Protocol):
    """A weight [O, I] that is a function of learned parameters; `Rounding` documents the members."""

    weight: Tensor
    scratch: Scratch

    @property
    def learned(self) -> Mapping[str, bool]:
        """See `Rounding`."""
        ...

    def placed(self) -> AbstractContextManager[None]:
        """See `Offloadable`."""
        ...

    def soft_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """See `Rounding`."""
        ...

    def gradients(self, rows: slice, gradient_OI: Tensor) -> tuple[Tensor, ...]:
        """See `Rounding`."""
        ...


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, soft: SoftWeight, bias: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.soft = soft
        with soft.placed():
            return linear_in_slabs(x, soft.weight.shape, lambda rows: soft.soft_rows(rows, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        soft: SoftWeight = ctx.soft
        g_TO, x_TI = gradients[0].flatten(0, -2), x.flatten(0, -2)
        gradient_x: Tensor | None = None
        found: list[tuple[Tensor, ...]] = []
        with soft.placed():
            for rows in slabs(soft.weight.shape):
                g = g_TO[:, rows]
                if ctx.needs_input_grad[0]:  # before a fused update changes the weight
                    w_hat = soft.soft_rows(rows, x.dtype)
                    gradient_x = torch.mm(g, w_hat) if gradient_x is None else gradient_x.addmm_(g, w_hat)
                if any(ctx.needs_input_grad[3:]):
                    gradient = soft.scratch.take("gradient", soft.weight[rows].shape, x.dtype, x.device)
                    found.append(soft.gradients(rows, torch.mm(g.t(), x_TI, out=gradient)))
        joined: list[Tensor | None] = [
            of_slabs[0] if len(of_slabs) == 1 else torch.cat(of_slabs) if by_rows else torch.stack(of_slabs).sum(0)
            for by_rows, of_slabs in zip(soft.learned.values() if found else (), zip(*found, strict=True), strict=True)
        ] or [None] * len(parameters)
        return None if gradient_x is None else gradient_x.view(x.shape), None, None, *joined


def rounded_linear(x: Tensor, soft: SoftWeight, bias: Tensor | None, *parameters: Tensor) -> Tensor:
    """`x @ w_hat^T + bias`, [..., O] in the dtype of x [..., I]; differentiable in x and in the parameters.

    Args:
        x: input.
        soft: makes w_hat, and the gradients of its parameters. It is placed in memory here, and again in the backward pass.
        bias: [O], or None; has no gradient.
        parameters: the learned parameters of `soft`, in the order of `soft.learned`.
    """
    product: Tensor = _RoundedLinear.apply(x, soft, bias, *parameters)  # type: ignore[no-untyped-call]
    return product
