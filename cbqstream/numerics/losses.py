"""The reconstruction loss. B batch, S sequence, D hidden; everything in float32.

    E(h, T) = sum_t sum_c w_t b_c (h_tc - T_tc)^2 + kl_weight * mean_t KL(softmax(T_t) || softmax(h_t))

Sums are over tokens t and channels c, the softmax is over the hidden dimension (CBQ, arXiv 2312.07950, eq. 6). CBQ's squared error has
w and b constant; but then a few massive tokens and channels own it, so each can be measured against its own power, more or less:

- `w_t = p_t^-beta / sum_t p_t^(1 - beta)` with `p_t = ||T_t||^2`. At the token balance beta = 1 every token's relative error counts the
  same (what reads a residual stream norms it first); at 0 a token counts as much as it is large.
- `b_c = m_c^-balance / sum_c m_c^(1 - balance)` with `m_c = sum_t w_t T_tc^2`, the channel's share of the power. At balance 0 it is 1,
  at 1 every channel's relative error counts the same.

The denominators keep E = 1 for h = 0, so that windows are comparable.

For the squared error, being near T1 and T2 at once is being near their mean: ||h - T1||^2 + ||h - T2||^2 = 2 ||h - (T1 + T2)/2||^2
+ const. So one mixed target `a T1 + (1 - a) T2` is kept.

Where the window ends with the last block, the divergence of the model's own predictions is added (`head_divergence`): the next-token
distribution of its hidden states against that of the original model's, mean_t KL(softmax(head(T1_t)) || softmax(head(h_t))).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_SMALLEST_SHARE = 1e-6
_SMALLEST_POWER = 1e-20
HEAD_TOKENS = 128

Head = Callable[[Tensor], Tensor]
"""Hidden states [T, D] of the last block to logits, float32 [T, vocabulary]; differentiable."""


@dataclass(frozen=True, slots=True)
class LossShape:
    """How the loss weighs tokens, channels and its two terms."""

    kl_weight: float
    token_balance: float
    channel_balance: float
    robust_tokens: int


def mixed_target(reference: Tensor, homologous: Tensor, a: float) -> Tensor:
    """`a T1 + (1 - a) T2`. Any shape."""
    return torch.lerp(homologous, reference, a)


def token_weights(target_BSD: Tensor, robust_tokens: int) -> Tensor:
    """Weights [B, S] with sum 1: none for the `robust_tokens` of each sequence whose target is largest, equal for the others."""
    weights_BS = torch.ones(target_BSD.shape[:2], device=target_BSD.device)
    if robust_tokens:
        norms_BS = target_BSD.float().square().sum(-1)
        order = norms_BS.argsort(dim=-1, descending=True, stable=True)
        weights_BS.scatter_(1, order[:, :robust_tokens], 0.0)
    return weights_BS / weights_BS.sum()


def channel_weights(share_D: Tensor, balance: float) -> Tensor:
    """b_c, [D], from the share of each channel in the power."""
    unscaled_D = (share_D + _SMALLEST_SHARE).pow(-balance)
    return unscaled_D / (unscaled_D * share_D).sum()


def reconstruction_loss(h_BSD: Tensor, target_BSD: Tensor, shape: LossShape) -> Tensor:
    """E(h, T), a float32 scalar, differentiable in `h_BSD`."""
    h_BSD, target_BSD = h_BSD.float(), target_BSD.float()
    weights_BS = token_weights(target_BSD, shape.robust_tokens)
    power_BS = target_BSD.square().sum(-1).clamp(min=_SMALLEST_POWER)
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


class _HeadDivergence(torch.autograd.Function):
    """Some tokens at a time, with the gradient computed on the way, so that logits of few tokens are in memory at once."""

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
    """mean_t KL(softmax(head(reference_t)) || softmax(head(h_t))), a float32 scalar, differentiable in `h_TD`."""
    divergence: Tensor = _HeadDivergence.apply(h_TD, reference_TD, head, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return divergence
