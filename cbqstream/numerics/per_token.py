"""Quantization of activations: symmetric, per token, dynamic, as compressed-tensors and vLLM apply it.

    s_t = max_c |x_tc| / ((2^b - 1) / 2)        x_hat = s * clamp(round(x / s), -2^(b-1), 2^(b-1) - 1)

A token t is one vector along the last dimension. Nothing is learned and nothing is stored: the scale is a function of the input.
"""

from typing import Any

import torch
from torch import Tensor

_EPSILON = torch.finfo(torch.float32).eps  # the scale of a token that is all zero


class _PerToken(torch.autograd.Function):
    """x_hat; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_bits: int) -> Tensor:
        low, high = -float(1 << (num_bits - 1)), float((1 << (num_bits - 1)) - 1)
        scale = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True, dtype=torch.float32) / ((high - low) / 2)
        scale = torch.where(scale == 0, _EPSILON, scale)
        return (x / scale).round_().clamp_(low, high).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def quantize_per_token(x: Tensor, num_bits: int) -> Tensor:
    """x_hat, shape and dtype of `x` [..., C]; computed in float32, differentiable straight through (Bengio et al. 2013)."""
    x_hat: Tensor = _PerToken.apply(x, num_bits)  # type: ignore[no-untyped-call]
    return x_hat
