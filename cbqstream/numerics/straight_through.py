"""Learned rounding with one value per weight, `full` mode (SignRound, Cheng et al. 2023, eq. 3), and the product with such a weight.

    w_hat = s * clamp(round(w / s + v), qmin - z, qmax - z),    s = s0 * exp(theta),    v in [-1/2, 1/2]

with the straight-through estimator d round(x) / dx = 1, so that

    d w_hat / d theta = s * (q - z - [in range] w / s)        (LSQ, Esser et al. 2020, eq. 3; d s / d theta = s)
    d w_hat / d v     = s * [in range]

and v is moved by the sign of its gradient as soon as the backward pass knows it: it needs no gradient and no optimizer state in memory.
The weight itself is needed twice in a step and kept in between by nobody: it is as large as the layer, and cheap beside its products.

Shapes as in `affine.py`. On the CPU the passes go in tiles of rows that fit in the cache, and all in float32: a comparison or a mixed dtype
takes three to eight times as long as the same thing in arithmetic.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from cbqstream.config import Kernels
from cbqstream.errors import UsageError
from cbqstream.numerics.affine import clamp_levels, grouped, row_tiles, rows_of
from cbqstream.numerics.scratch import Scratch

Bound = Tensor | float
"""Of levels q - z: a number, or float32 [O, G, 1]; see `level_range`."""


class Passes(Protocol):
    """The two passes over a weight. Scales are s, float32 [O, G]."""

    def soft(self, w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound, out_OI: Tensor) -> None:
        """Write w_hat into `out_OI`, in its dtype."""
        ...

    def move(
        self, w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound, gradient_OI: Tensor, step: float
    ) -> Tensor:
        """The gradient of theta, float32 [O, G], from that of w_hat; v moves by `step` against the sign of its own."""
        ...


class Plain:
    """In tiles of rows, with torch alone."""

    def soft(self, w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound, out_OI: Tensor) -> None:
        """See `Passes`."""
        scale_OG1, groups = scale_OG.unsqueeze(-1), scale_OG.shape[1]
        for rows in row_tiles(w_OI):
            levels = grouped(w_OI[rows].float(), groups) / scale_OG1[rows]
            levels.add_(grouped(v_OI[rows].float(), groups)).round_()
            clamp_levels(levels, rows_of(low, rows), rows_of(high, rows))
            torch.mul(levels, scale_OG1[rows], out=grouped(out_OI[rows], groups))

    def move(
        self, w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound, gradient_OI: Tensor, step: float
    ) -> Tensor:
        """See `Passes`."""
        scale_OG1, groups = scale_OG.unsqueeze(-1), scale_OG.shape[1]
        gradient_OG = torch.empty_like(scale_OG)
        for rows in row_tiles(w_OI):
            gradient, v = grouped(gradient_OI[rows].float(), groups), grouped(v_OI[rows].float(), groups)
            w_over_s = grouped(w_OI[rows].float(), groups) / scale_OG1[rows]
            levels = (w_over_s + v).round_()
            clamped = levels.clamp(rows_of(low, rows), rows_of(high, rows))  # type: ignore[arg-type]
            inside = levels.sub_(clamped).abs_().clamp_(max=1).neg_().add_(1)  # 1 or 0: levels are whole numbers
            slope = clamped.addcmul_(w_over_s, inside, value=-1).mul_(gradient)
            torch.mul(slope.sum(-1), scale_OG[rows], out=gradient_OG[rows])
            v.sub_(inside.mul_(torch.sign(gradient)), alpha=step).clamp_(-0.5, 0.5)
            v_OI[rows] = v.flatten(1)
        return gradient_OG


def passes_for(kernels: Kernels, device: torch.device) -> Passes:
    """The plain ones on the CPU, or where they are asked for; on CUDA those of `straight_through_triton.py`.

    Raises:
        UsageError: triton is not installed.
    """
    if kernels == "plain" or device.type == "cpu":
        return Plain()
    try:
        return cast("Passes", importlib.import_module("cbqstream.numerics.straight_through_triton"))
    except ImportError as error:
        raise UsageError(f"triton cannot be loaded ({error}). Install it, or use --kernels plain.") from error


@dataclass(frozen=True, slots=True)
class StraightThrough:
    """A weight whose rounding is learned."""

    weight: Tensor
    """w [O, I], any float dtype."""
    scale0: Tensor
    """s0, float32 [O, G]."""
    v: Tensor
    """float16 [O, I]; moved in place."""
    low: Bound
    high: Bound
    step: float
    """How far v moves in a backward pass."""
    passes: Passes
    scratch: Scratch

    def soft(self, theta_OG: Tensor, dtype: torch.dtype) -> Tensor:
        """w_hat [O, I] in `dtype`, in memory that the next one uses again."""
        w_hat = self.scratch.take("weight", self.weight.shape, dtype, self.weight.device)
        self.passes.soft(self.weight, self.scale0 * theta_OG.exp(), self.v, self.low, self.high, w_hat)
        return w_hat

    def move(self, theta_OG: Tensor, gradient_OI: Tensor) -> Tensor:
        """Gradient of theta, float32 [O, G], from that of w_hat; v moves."""
        scale_OG = self.scale0 * theta_OG.exp()
        return self.passes.move(self.weight, scale_OG, self.v, self.low, self.high, gradient_OI, self.step)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, theta_OG: Tensor, weight: StraightThrough, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, theta_OG)
        ctx.weight = weight
        return functional.linear(x, weight.soft(theta_OG, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, theta_OG), weight = ctx.saved_tensors, ctx.weight
        g_TO, x_TI = gradients[0].flatten(0, -2), x.flatten(0, -2)
        gradient_x = None
        if ctx.needs_input_grad[0]:  # before v moves
            gradient_x = torch.mm(g_TO, weight.soft(theta_OG, x.dtype)).view(x.shape)
        gradient_OI = weight.scratch.take("gradient", weight.weight.shape, x.dtype, x.device)
        torch.mm(g_TO.t(), x_TI, out=gradient_OI)
        return gradient_x, weight.move(theta_OG, gradient_OI), None, None


def straight_through_product(x: Tensor, theta_OG: Tensor, weight: StraightThrough, bias: Tensor | None) -> Tensor:
    """`x @ w_hat^T + bias`, [..., O] in the dtype of x [..., I]; differentiable in x and theta, and v moves in the backward pass."""
    product: Tensor = _Product.apply(x, theta_OG, weight, bias)  # type: ignore[no-untyped-call]
    return product
