"""The reconstruction loss and the divergence of the next-token distribution, against their definitions."""

import pytest
import torch

from cbqstream.numerics.losses import (
    LossShape,
    channel_weights,
    head_divergence,
    mixed_target,
    reconstruction_loss,
    token_weights,
)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss(h, target, *, kl_weight=0.0, tokens=1.0, balance=0.0, robust_tokens=0):
    return reconstruction_loss(h, target, LossShape(kl_weight, tokens, balance, robust_tokens)).item()


@pytest.mark.parametrize("tokens", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_loss_is_zero_for_the_target_and_one_for_zeros(tokens, balance):
    target = random(0, 2, 5, 8)
    assert loss(target, target, kl_weight=1.0, tokens=tokens, balance=balance) == pytest.approx(0, abs=1e-6)
    assert loss(0 * target, target, tokens=tokens, balance=balance) == pytest.approx(1, abs=1e-4)


def test_two_targets_and_their_mean_give_the_same_gradient():
    """Homologous reconstruction: ||h - T1||^2 + ||h - T2||^2 and 2 ||h - (T1 + T2) / 2||^2 have the same gradient."""
    t1, t2 = random(1, 2, 5, 8), random(2, 2, 5, 8)
    h = random(3, 2, 5, 8).requires_grad_()
    ((h - t1).square().sum() + (h - t2).square().sum()).backward()
    both, h.grad = h.grad.clone(), None
    (2 * (h - mixed_target(t1, t2, 0.5)).square().sum()).backward()
    assert torch.allclose(h.grad, both, atol=1e-5)


def test_target_mix_of_one_and_zero_are_the_two_targets_themselves():
    t1, t2 = random(1, 3), random(2, 3)
    assert torch.equal(mixed_target(t1, t2, 1.0), t1)
    assert torch.equal(mixed_target(t1, t2, 0.0), t2)


def test_loss_of_a_worked_example_with_and_without_token_balance_and_kl_term():
    target, h = torch.tensor([[[3.0, 4.0], [0.0, 10.0]]]), torch.tensor([[[3.0, 5.0], [0.0, 8.0]]])
    squared = loss(h, target, tokens=0.0)
    assert squared == pytest.approx((1 + 4) / (25 + 100))
    assert loss(h, target, tokens=1.0) == pytest.approx((1 / 25 + 4 / 100) / 2)
    p, q = target.softmax(-1), h.softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    assert loss(h, target, tokens=0.0, kl_weight=0.5) - squared == pytest.approx(0.5 * divergence.item())


def test_full_channel_balance_gives_all_channels_the_same_weight():
    """Channel 0 is 30 times as large as channel 1. An error of 10 % gives the same loss in both channels."""
    target = random(4, 3, 7, 2) * torch.tensor([30.0, 1.0])
    first, second = target.clone(), target.clone()
    first[..., 0] *= 1.1
    second[..., 1] *= 1.1
    assert loss(first, target, tokens=0.0, balance=1.0) == pytest.approx(
        loss(second, target, tokens=0.0, balance=1.0), rel=0.01
    )
    assert loss(first, target, tokens=0.0) > 100 * loss(second, target, tokens=0.0)


def test_channel_weights_of_a_worked_example():
    share = torch.tensor([0.64, 0.36])
    weights = channel_weights(share, 0.5)
    assert (weights * share).sum() == pytest.approx(1)
    assert (weights[1] / weights[0]).item() == pytest.approx(0.8 / 0.6, rel=1e-4)


def test_robust_tokens_leaves_out_the_token_with_the_largest_norm_of_each_segment():
    target = torch.ones(2, 4, 3)
    target[0, 2] = 100
    target[1, 0] = -50
    assert (token_weights(target, 1) * 6).tolist() == [pytest.approx([1, 1, 0, 1]), pytest.approx([0, 1, 1, 1])]
    h = target.clone()
    h[0, 2] += 10
    assert loss(h, target, kl_weight=1.0, robust_tokens=1) == pytest.approx(0, abs=1e-6)


def test_head_divergence_and_its_gradient_equal_autograd_over_all_tokens():
    """The 300 tokens are computed in pieces of at most 128 tokens. The comparison computes all of them at once."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator)
    h, reference = torch.randn(300, 8, generator=generator), torch.randn(300, 8, generator=generator)
    h.requires_grad_(True)

    def head(x):
        return x @ weight.T

    loss = 3 * head_divergence(h, reference, head)
    loss.backward()
    again = h.detach().clone().requires_grad_(True)
    expected = (head(reference).log_softmax(-1), head(again).log_softmax(-1))
    whole = 3 * (expected[0].exp() * (expected[0] - expected[1])).sum(-1).mean()
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    assert torch.allclose(h.grad, again.grad, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        assert head_divergence(reference, reference, head).item() == pytest.approx(0, abs=1e-6)
