"""Symmetric quantization of activations: x_hat = s * clamp(round(x / s), -2^(b-1), 2^(b-1) - 1).

Per token (dynamic): s_t = max_c |x_tc| / ((2^b - 1) / 2), where a token t is one vector along the last dimension. compressed-tensors uses
the same formula; vLLM divides by 2^(b-1) - 1. Nothing is learned or stored, because the scale is a function of the input.

Per tensor (static): all inputs of a layer share one step size s = s0 * exp(theta). It is learned (S_X of CBQ, arXiv 2312.07950, sec. 3.3)
with the gradient of Esser et al. 2020, eq. 3, and stored as `input_scale`.
"""

from typing import Any

import torch
from torch import Tensor

from cbqstream.numerics.affine import SMALLEST_SCALE

_EPSILON = torch.finfo(torch.float32).eps  # scale of a token whose values are all zero


def code_range(num_bits: int) -> tuple[float, float]:
    """Smallest and largest code of `num_bits` bits, as floats."""
    return -float(1 << (num_bits - 1)), float((1 << (num_bits - 1)) - 1)


class _PerToken(torch.autograd.Function):
    """Quantization per token; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_bits: int) -> Tensor:
        low, high = code_range(num_bits)
        scale = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True, dtype=torch.float32) / ((high - low) / 2)
        scale = torch.where(scale == 0, _EPSILON, scale)
        return (x / scale).round_().clamp_(low, high).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def quantize_per_token(x: Tensor, num_bits: int) -> Tensor:
    """Quantize each token with a scale of its own.

    Args:
        x: activations [..., C], any float dtype.
        num_bits: width of a code in bits, b.

    Returns:
        x_hat, in the shape and dtype of `x`, computed in float32. The gradient passes straight through (Bengio et al. 2013).
    """
    x_hat: Tensor = _PerToken.apply(x, num_bits)  # type: ignore[no-untyped-call]
    return x_hat


class _PerTensor(torch.autograd.Function):
    """Quantization per tensor, with a learned step size.

    The gradient passes to `x` where its code is in range, and to theta with d x_hat / d s = q - [in range] x / s.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, scale0: Tensor, num_bits: int) -> Tensor:
        low, high = code_range(num_bits)
        scale = scale0 * theta.exp()
        ctx.save_for_backward(x, scale)
        ctx.num_bits = num_bits
        return (x / scale).round_().clamp_(low, high).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        low, high = code_range(ctx.num_bits)
        x_over_s = x / scale
        codes = x_over_s.round()
        inside = (codes >= low) & (codes <= high)
        slope = codes.clamp_(low, high).sub_(x_over_s.mul_(inside)).mul_(grads[0])
        return grads[0] * inside, slope.sum(dtype=torch.float32).view_as(scale) * scale, None, None


def quantize_per_tensor(x: Tensor, theta: Tensor, scale0: Tensor, num_bits: int) -> Tensor:
    """Quantize all tokens with the step size `scale0 * exp(theta)`.

    Args:
        x: activations, any shape and float dtype.
        theta: learned logarithm of the change of the step size, float32 [1].
        scale0: starting step size, float32 [1].
        num_bits: width of a code in bits, b.

    Returns:
        x_hat, in the shape and dtype of `x`; differentiable in `x` and `theta`.
    """
    x_hat: Tensor = _PerTensor.apply(x, theta, scale0, num_bits)  # type: ignore[no-untyped-call]
    return x_hat


def starting_step(second_moment_I: Tensor, largest: Tensor, num_bits: int) -> Tensor:
    """Starting value of a learned step size.

    It is 2 sqrt(E[x^2] / qmax) (Esser et al. 2020), or the step size whose codes just reach the largest input if that is smaller.

    Args:
        second_moment_I: E[x^2] per input column, float32.
        largest: largest absolute value of the inputs, a scalar.
        num_bits: width of a code in bits, b.

    Returns:
        The step size, float32 [1].
    """
    low, high = code_range(num_bits)
    step = torch.minimum(2 * (second_moment_I.mean() / high).sqrt(), largest / ((high - low) / 2))
    return step.clamp(min=SMALLEST_SCALE).view(1)  # all inputs may be zero
