"""The reconstruction loss of a window, computed in float32.

Shapes: B batch, S sequence, T tokens, D hidden dimension. The loss of the output h for the target T is

    E(h, T) = sum_t sum_c w_t b_c (h_tc - T_tc)^2 + kl_weight * mean_t KL(softmax(T_t) || softmax(h_t))

Sums are over tokens t and channels c, and the softmax is over the hidden dimension (CBQ, arXiv 2312.07950, eq. 6). In CBQ, w and b are
constant, so a few massive tokens and channels dominate the squared error. Here, two settings weight the error of each token and channel
relative to its own power:

- `w_t = p_t^-beta / sum_t p_t^(1 - beta)` with the power `p_t = ||T_t||^2` of a token. With a token balance beta of 1, the relative errors
  of all tokens have equal weight, because the layers that read a residual stream normalize it first. With 0, squared errors have equal
  weight, so large tokens contribute most.
- `b_c = m_c^-balance / sum_c m_c^(1 - balance)` with `m_c = sum_t w_t T_tc^2`, the share of the power that is in channel c. With a channel
  balance of 0, b is 1. With 1, the relative errors of all channels have equal weight.

The denominators make the squared error 1 for h = 0, so that the losses of windows are comparable.

The squared error for two targets T1 and T2 is, up to a constant, the squared error for their mean:
||h - T1||^2 + ||h - T2||^2 = 2 ||h - (T1 + T2)/2||^2 + const. So only one mixed target `a T1 + (1 - a) T2` is stored.

If a window ends with the last block, the divergence of the next-token predictions is added (`head_divergence`). It compares the
predictions from h with those of the original model: mean_t KL(softmax(head(T1_t)) || softmax(head(h_t))).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_SMALLEST_SHARE = 1e-6
SMALLEST_POWER = 1e-20
"""Smallest power of a token that a loss divides by."""
HEAD_TOKENS = 128
"""Number of tokens whose logits are in memory at once."""

Head = Callable[[Tensor], Tensor]
"""A function from hidden states [T, D] of the last block to logits, float32 [T, vocabulary]; differentiable."""


@dataclass(frozen=True, slots=True)
class LossShape:
    """Weights of the tokens, the channels and the two terms of the reconstruction loss."""

    kl_weight: float
    """Weight of the KL divergence over the hidden dimension."""
    token_balance: float
    """Exponent beta of the token weights, 0 to 1."""
    channel_balance: float
    """Exponent of the channel weights, 0 to 1."""
    robust_tokens: int
    """Number of tokens per sequence that the loss leaves out: the tokens with the largest target norm."""


def mixed_target(reference: Tensor, homologous: Tensor, a: float) -> Tensor:
    """Mixed target `a T1 + (1 - a) T2`, for two targets of any shape.

    Args:
        reference: T1, the output of the original model.
        homologous: T2, the output of the original blocks for quantized inputs.
        a: share of T1, 0 to 1.
    """
    return torch.lerp(homologous, reference, a)


def token_weights(target_BSD: Tensor, robust_tokens: int) -> Tensor:
    """Token weights before balancing, [B, S] with sum 1.

    The weight is 0 for the `robust_tokens` tokens of each sequence with the largest target norm, and equal for all other tokens.
    """
    weights_BS = torch.ones(target_BSD.shape[:2], device=target_BSD.device)
    if robust_tokens:
        norms_BS = target_BSD.float().square().sum(-1)
        order = norms_BS.argsort(dim=-1, descending=True, stable=True)
        weights_BS.scatter_(1, order[:, :robust_tokens], 0.0)
    return weights_BS / weights_BS.sum()


def channel_weights(share_D: Tensor, balance: float) -> Tensor:
    """Channel weights b_c, [D], from the share of the power that is in each channel."""
    unscaled_D = (share_D + _SMALLEST_SHARE).pow(-balance)
    return unscaled_D / (unscaled_D * share_D).sum()


def reconstruction_loss(h_BSD: Tensor, target_BSD: Tensor, shape: LossShape) -> Tensor:
    """Reconstruction loss E(h, T), a float32 scalar that is differentiable in `h_BSD`."""
    h_BSD, target_BSD = h_BSD.float(), target_BSD.float()
    weights_BS = token_weights(target_BSD, shape.robust_tokens)
    power_BS = target_BSD.square().sum(-1).clamp(min=SMALLEST_POWER)
    unscaled_BS = weights_BS * power_BS.pow(-shape.token_balance)
    weights_BS1 = (unscaled_BS / (unscaled_BS * power_BS).sum()).unsqueeze(-1)
    squared_D = ((h_BSD - target_BSD).square() * weights_BS1).sum((0, 1))
    if shape.channel_balance:
        share_D = (target_BSD.square() * weights_BS1).sum((0, 1))
        squared_D = squared_D * channel_weights(share_D, shape.channel_balance)
    loss = squared_D.sum()
    if shape.kl_weight:
        divergence_BS = functional.kl_div(
            h_BSD.log_softmax(-1), target_BSD.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        loss = loss + shape.kl_weight * (divergence_BS * weights_BS).sum()
    return loss


def expert_loss(h_TD: Tensor, target_TD: Tensor, token_T: Tensor, power_T: Tensor, channel_D: Tensor) -> Tensor:
    """Squared error of weighted outputs of an expert, `sum_t sum_c w_t b_c (h_tc - T_tc)^2 / sum_t w_t p_t`, a float32 scalar.

    Token and channel weights are those of the output of the block, because that is where the outputs of the experts are added. So the
    error is relative to the power of the hidden states, not of the output of one expert.

    Args:
        h_TD: outputs of the expert times the weights of the router.
        target_TD: what they should be.
        token_T: token weights w before normalization.
        power_T: power p of the tokens at the output of the block.
        channel_D: channel weights b.
    """
    squared_D = ((h_TD.float() - target_TD.float()).square() * token_T.unsqueeze(1)).sum(0)
    return (squared_D * channel_D).sum() / (token_T * power_T).sum()


class _HeadDivergence(torch.autograd.Function):
    """Divergence of next-token predictions, computed for a few tokens at a time.

    The gradient is computed in the forward pass, so that the logits of only `HEAD_TOKENS` tokens are in memory at once.
    """

    @staticmethod
    def forward(ctx: Any, h_TD: Tensor, reference_TD: Tensor, head: Head, with_gradient: bool) -> Tensor:  # noqa: FBT001
        total = torch.zeros((), device=h_TD.device)
        gradients = []
        for h, reference in zip(torch.split(h_TD, HEAD_TOKENS), torch.split(reference_TD, HEAD_TOKENS), strict=True):
            expected = head(reference).log_softmax(-1)
            with torch.set_grad_enabled(with_gradient):
                leaf = h.detach().requires_grad_(with_gradient)
                found = head(leaf).log_softmax(-1)
                divergence = functional.kl_div(found, expected, log_target=True, reduction="sum")
            if with_gradient:
                gradients.append(torch.autograd.grad(divergence, leaf)[0])
            total += divergence.detach()
        if with_gradient:
            ctx.save_for_backward(torch.cat(gradients) / len(h_TD))
        return total / len(h_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * grads[0], None, None, None


def head_divergence(h_TD: Tensor, reference_TD: Tensor, head: Head) -> Tensor:
    """Divergence of next-token predictions, mean_t KL(softmax(head(reference_t)) || softmax(head(h_t))).

    Args:
        h_TD: hidden states of the last block.
        reference_TD: hidden states of the last block of the original model.
        head: the head of the model.

    Returns:
        A float32 scalar that is differentiable in `h_TD`.
    """
    divergence: Tensor = _HeadDivergence.apply(h_TD, reference_TD, head, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return divergence
