"""The reconstruction loss against its definition."""

import pytest
import torch

from cbqstream.numerics.losses import mixed_target, reconstruction_loss, token_weights


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_zero_at_the_target():
    target = random(0, 2, 5, 8)
    for relative in (True, False):
        assert reconstruction_loss(target, target, kl_weight=1.0, robust_tokens=0, relative=relative) == pytest.approx(
            0, abs=1e-6
        )


def test_gradient_of_two_targets_is_that_of_their_mean():
    """Homologous reconstruction: ||h - T1||^2 + ||h - T2||^2 and 2 ||h - (T1 + T2) / 2||^2 have one gradient."""
    t1, t2 = random(1, 2, 5, 8), random(2, 2, 5, 8)
    h = random(3, 2, 5, 8).requires_grad_()
    ((h - t1).square().sum() + (h - t2).square().sum()).backward()
    both, h.grad = h.grad.clone(), None
    (2 * (h - mixed_target(t1, t2, 0.5)).square().sum()).backward()
    assert torch.allclose(h.grad, both, atol=1e-5)


def test_mix_ends():
    t1, t2 = random(1, 3), random(2, 3)
    assert torch.equal(mixed_target(t1, t2, 1.0), t1)
    assert torch.equal(mixed_target(t1, t2, 0.0), t2)


def test_terms_by_hand():
    target, h = torch.tensor([[[3.0, 4.0], [0.0, 10.0]]]), torch.tensor([[[3.0, 5.0], [0.0, 8.0]]])
    squared = reconstruction_loss(h, target, kl_weight=0.0, robust_tokens=0, relative=False)
    assert squared == pytest.approx((1 + 4) / (25 + 100))
    relative = reconstruction_loss(h, target, kl_weight=0.0, robust_tokens=0, relative=True)
    assert relative == pytest.approx((1 / 25 + 4 / 100) / 2)
    p, q = target.softmax(-1), h.softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    with_kl = reconstruction_loss(h, target, kl_weight=0.5, robust_tokens=0, relative=False)
    assert with_kl - squared == pytest.approx(0.5 * divergence.item())


def test_robust_tokens_leaves_out_the_largest_of_each_sequence():
    target = torch.ones(2, 4, 3)
    target[0, 2] = 100
    target[1, 0] = -50
    assert token_weights(target, 1).tolist() == [[1, 1, 0, 1], [0, 1, 1, 1]]
    h = target.clone()
    h[0, 2] += 10
    assert reconstruction_loss(h, target, kl_weight=1.0, robust_tokens=1, relative=False) == pytest.approx(0, abs=1e-6)
