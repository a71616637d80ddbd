"""The reconstruction loss. B batch, S sequence, D hidden; everything in float32.

    E(h, T) = mean ||h - T||^2 / mean ||T||^2 + kl_weight * mean KL(softmax(T) || softmax(h))

Both means are over tokens, the softmax is over the hidden dimension (CBQ, arXiv 2312.07950, eq. 6). The first term is divided by the
power of the target, which is a constant of the window, so that both terms and the penalty mean the same in every window.

For the squared error, being near T1 and T2 at once is being near their mean: ||h - T1||^2 + ||h - T2||^2 = 2 ||h - (T1 + T2)/2||^2
+ const. So one mixed target `a T1 + (1 - a) T2` is kept.
"""

import torch
from torch import Tensor
from torch.nn import functional


def mixed_target(reference: Tensor, homologous: Tensor, a: float) -> Tensor:
    """`a T1 + (1 - a) T2`. Any shape."""
    return torch.lerp(homologous, reference, a)


def token_weights(target_BSD: Tensor, robust_tokens: int) -> Tensor:
    """1 for tokens that the loss sees and 0 for the `robust_tokens` of each sequence whose target has the largest norm; [B, S]."""
    weights_BS = torch.ones(target_BSD.shape[:2], device=target_BSD.device)
    if robust_tokens:
        norms_BS = target_BSD.float().square().sum(-1)
        order = norms_BS.argsort(dim=-1, descending=True, stable=True)
        weights_BS.scatter_(1, order[:, :robust_tokens], 0.0)
    return weights_BS


def reconstruction_loss(
    h_BSD: Tensor, target_BSD: Tensor, *, kl_weight: float, robust_tokens: int, relative: bool
) -> Tensor:
    """E(h, T), a float32 scalar, differentiable in `h_BSD`.

    Args:
        h_BSD: output of the window.
        target_BSD: what it should be.
        kl_weight: of the second term.
        robust_tokens: see `token_weights`.
        relative: divide each token's squared error by that token's own power instead of the mean power. What reads a residual
            stream norms it first, so this is the error that the rest of the model sees, and no token can own the loss.
    """
    h_BSD, target_BSD = h_BSD.float(), target_BSD.float()
    weights_BS = token_weights(target_BSD, robust_tokens)
    squared_BS = (h_BSD - target_BSD).square().sum(-1)
    power_BS = target_BSD.square().sum(-1)
    if relative:
        loss = (squared_BS / power_BS * weights_BS).sum() / weights_BS.sum()
    else:
        loss = (squared_BS * weights_BS).sum() / (power_BS * weights_BS).sum()
    if kl_weight:
        divergence_BS = functional.kl_div(
            h_BSD.log_softmax(-1), target_BSD.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        loss = loss + kl_weight * (divergence_BS * weights_BS).sum() / weights_BS.sum()
    return loss
