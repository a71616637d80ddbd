"""Learned rounding: where it starts, what its gradients are, and that both modes are one interface."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from cbqstream.rounding.low_rank import LowRank, inverse_rectified_sigmoid, rectified_sigmoid, rounding_penalty
from cbqstream.rounding.straight_through import Plain, StraightThrough
from torch import nn
from torch.nn import functional

from cbqstream.config import ReconstructionConfig
from cbqstream.numerics import slabs
from cbqstream.numerics.affine import dequantize, grouped, level_range
from cbqstream.numerics.scale_search import minmax_grid
from cbqstream.rounding.product import learned_product
from cbqstream.rounding.rounding import FullRounding, LowRankRounding, TrainingStep, make_rounding
from cbqstream.runtime.scratch import Scratch
from cbqstream.scheme import Scheme
from cbqstream.windows.quantized_linear import Phase, QuantizedLinear

SCHEMES = [
    Scheme(num_bits=2, group_size=8, symmetric=False),
    Scheme(num_bits=4, group_size=None, symmetric=True),
    Scheme(num_bits=3, group_size=16, symmetric=True),
]


def make(scheme, mode="signround", seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(12, 32, generator=generator) * 0.1).to(dtype)
    return make_rounding(w, *minmax_grid(w, scheme), scheme, ReconstructionConfig(rounding=mode), generator, Scratch())


def test_inverse_of_the_rectified_sigmoid():
    h = torch.linspace(0, 1, 101)
    assert torch.allclose(rectified_sigmoid(inverse_rectified_sigmoid(h)), h, atol=1e-6)


def test_penalty_is_zero_only_when_decided():
    assert rounding_penalty(torch.tensor([0.0, 1.0, 1.0]), 4.0) == 0
    assert rounding_penalty(torch.tensor([0.5]), 4.0) == 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("mode", ["nearest", "lora_rounding", "signround"])
def test_step_zero_is_round_to_nearest_when_hard(mode, scheme):
    rounding = make(scheme, mode)
    nearest = make(scheme, "nearest")
    assert torch.equal(rounding.harden().codes, nearest.harden().codes)
    assert rounding.changed() == (0, 12 * 32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_step_zero_of_lora_is_full_precision_when_soft(scheme):
    rounding = make(scheme, "lora_rounding")
    w, scale = rounding.weight, rounding.scale0
    low, high = level_range(scheme, rounding.zero_point)
    reach = grouped(w, scale.shape[1]) / scale.unsqueeze(-1)
    inside = ((reach >= low) & (reach <= high)).flatten(1)
    assert inside.float().mean() > 0.8
    assert torch.allclose(rounding.soft()[inside], w[inside], atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_full_mode_soft_weight_is_its_hard_weight_up_to_the_stored_scale(scheme):
    rounding = make(scheme, "signround")
    assert isinstance(rounding, FullRounding)
    rounding.v.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(rounding.soft(), dequantize(rounding.harden()), atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_straight_through_gradients_against_autograd(scheme):
    """The hand-written backward pass against the same formula with a detached rounding error, in float64-free autograd."""
    rounding = make(scheme, "signround")
    assert isinstance(rounding, FullRounding)
    rounding.v.uniform_(-0.4, 0.4, generator=torch.Generator().manual_seed(2))
    low, high = level_range(scheme, rounding.zero_point)
    grad = torch.randn(12, 32, generator=torch.Generator().manual_seed(3))
    groups = rounding.scale0.shape[1]

    theta = torch.full_like(rounding.scale0, 0.01, requires_grad=True)
    v = rounding.v.float().requires_grad_()
    scale = (rounding.scale0 * theta.exp()).unsqueeze(-1)
    x = grouped(rounding.weight, groups) / scale + grouped(v, groups)
    levels = torch.clamp(x + (x.round() - x).detach(), low, high)
    expected = (levels * scale).flatten(1)
    expected.backward(grad)

    again = theta.detach().clone().requires_grad_()
    stepped = rounding.v.clone()
    weight = StraightThrough(rounding.weight, rounding.scale0, stepped, low, high, 0.05, Plain(), Scratch())
    assert torch.allclose(weight.soft([again.detach()], torch.float32), expected, atol=1e-7)
    learned_product(torch.eye(32), partial(nullcontext, weight), None, again).backward(grad.t())
    assert torch.allclose(again.grad, theta.grad, atol=1e-5)
    moved = (rounding.v.float() - 0.05 * v.grad.sign()).clamp(-0.5, 0.5)
    assert torch.allclose(stepped.float(), moved, atol=1e-3)


def test_full_mode_moves_nothing_without_gradients():
    rounding = make(SCHEMES[0], "signround")
    assert isinstance(rounding, FullRounding)
    rounding.begin_step(TrainingStep(0.0, 1.0, 10, 0.1))
    with torch.no_grad():
        rounding.product(torch.eye(32), None)
    assert not rounding.v.any()


def test_full_mode_travels_at_most_its_range_and_its_rate_falls_to_zero():
    rounding = make(SCHEMES[1], "signround")
    assert isinstance(rounding, FullRounding)
    steps = 20
    for step in range(steps):
        rounding.begin_step(TrainingStep(step / steps, 1 - step / steps, steps, 0.1))
        rounding.product(torch.eye(32), None).sum().backward()
    assert rounding.v.abs().max() == pytest.approx(ReconstructionConfig().max_shift, rel=1.5 / steps)


def test_scale_is_stored_before_codes_are_assigned():
    rounding = make(SCHEMES[1], "signround")
    with torch.no_grad():
        rounding.theta += 0.0123
    hard = rounding.harden()
    assert torch.equal(hard.scale, hard.scale.to(torch.bfloat16).float())
    nearest = (rounding.weight / hard.scale).round().clamp(-8, 7)
    assert torch.equal(hard.codes.float(), nearest)


@pytest.mark.parametrize("mode", ["nearest", "lora_rounding", "signround"])
def test_state_restores_exactly(mode):
    rounding, fresh = make(SCHEMES[0], mode), make(SCHEMES[0], mode, seed=0)
    with torch.no_grad():
        rounding.theta += 0.05
        if isinstance(rounding, FullRounding):
            rounding.v += 0.3
        if isinstance(rounding, LowRankRounding):
            rounding.a2 += 1.0
    state = rounding.state() | rounding.large_state()
    assert not torch.equal(fresh.harden().scale, rounding.harden().scale)
    fresh.load(state)
    assert torch.equal(fresh.harden().codes, rounding.harden().codes)
    assert torch.equal(fresh.harden().scale, rounding.harden().scale)


@pytest.mark.parametrize("beta", [20.0, 2.0])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_low_rank_gradients_against_autograd(scheme, beta):
    """The written-out backward pass, penalty included, against autograd of the formulas in float64."""
    rounding, generator = make(scheme, "lora_rounding"), torch.Generator().manual_seed(7)
    groups, bounds = rounding.scale0.shape[1], level_range(scheme, rounding.zero_point)
    theta, a1, a2 = (
        (torch.randn(value.shape, generator=generator) * 0.3).double().requires_grad_()
        for value in (rounding.theta, rounding.a1, rounding.a2)
    )
    gradient = torch.randn(12, 32, generator=generator)
    low, high = (bound.double() if isinstance(bound, torch.Tensor) else bound for bound in bounds)

    reached = grouped(rounding.weight.double(), groups) / rounding.scale0.double().unsqueeze(-1)
    v0 = inverse_rectified_sigmoid(reached - reached.floor())
    rise = rectified_sigmoid(v0 + grouped(a1 @ a2, groups))
    levels = torch.clamp(reached.floor() + rise, low, high)
    expected = (levels * (rounding.scale0.double() * theta.exp()).unsqueeze(-1)).flatten(1)
    ((expected * gradient.double()).sum() + 0.5 * rounding_penalty(rise, beta)).backward()

    weight = LowRank(rounding.weight, rounding.scale0, *bounds, beta, 0.5 / (12 * 32), Scratch())
    parameters = [value.detach().float().requires_grad_() for value in (theta, a1, a2)]
    learned_product(torch.eye(32), partial(nullcontext, weight), None, *parameters).backward(gradient.t())
    assert torch.allclose(
        weight.soft([value.detach() for value in parameters], torch.float32).double(), expected, atol=1e-5
    )
    for found, exact in zip(parameters, (theta, a1, a2), strict=True):
        assert exact.grad.abs().max() > 0
        assert torch.allclose(found.grad.double(), exact.grad, atol=1e-5 * exact.grad.abs().max().item())


def test_weights_stay_in_the_dtype_they_came_in():
    rounding = make(SCHEMES[0], "signround", dtype=torch.bfloat16)
    assert rounding.weight.dtype == torch.bfloat16
    assert rounding.soft().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["nearest", "lora_rounding", "signround"])
def test_products_are_those_of_the_soft_weight(mode, dtype):
    """Output, and gradients of the input and of what is learned, against a plain product that keeps its weight, bit for bit."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 7, 32, generator=generator).to(dtype)
    bias = torch.randn(12, generator=generator).to(dtype)
    grad = torch.randn(2, 7, 12, generator=generator).to(dtype)

    rounding = make(SCHEMES[0], mode)
    inputs, weight = x.clone().requires_grad_(), rounding.soft().detach().to(dtype).requires_grad_()
    expected = functional.linear(inputs, weight, bias)
    expected.backward(grad)
    again = x.clone().requires_grad_()
    rounding.begin_step(TrainingStep(0.0, 1.0, 20, 0.1))
    actual = rounding.product(again, bias)
    actual.backward(grad)
    assert torch.equal(actual, expected)
    assert torch.equal(again.grad, inputs.grad)

    other = make(SCHEMES[0], mode)
    other.begin_step(TrainingStep(0.0, 1.0, 20, 0.1))
    learned = [rounding.theta, *rounding.rounding_parameters()]
    if mode == "nearest":
        found = [(weight.grad.float() * rounding.soft().detach()).unflatten(1, (4, 8)).sum(-1)]
        assert torch.allclose(rounding.theta.grad, found[0], rtol=1e-5, atol=1e-5)
        return
    parameters = [value.detach() for value in (other.theta, *other.rounding_parameters())]
    for value, expected in zip(learned, other._weight().gradients(parameters, weight.grad), strict=True):
        assert torch.equal(value.grad, expected)
    if isinstance(other, FullRounding):
        assert torch.equal(rounding.v, other.v)


@pytest.mark.parametrize("mode", ["lora_rounding", "signround"])
@pytest.mark.parametrize("phase", list(Phase))
def test_a_large_weight_in_slabs_of_rows(monkeypatch, mode, phase):
    """Output, gradients, and where the values went, with five rows at a time and all at once."""
    found = []
    for slab in (5 * 32, 1 << 20):
        monkeypatch.setattr(slabs, "SLAB_WEIGHTS", slab)
        rounding, generator = make(SCHEMES[0], mode), torch.Generator().manual_seed(5)
        x = torch.randn(2, 7, 32, generator=generator)
        linear = nn.Linear(32, 12)
        linear.weight, linear.bias = nn.Parameter(rounding.weight), nn.Parameter(torch.randn(12, generator=generator))
        layer = QuantizedLinear(linear.requires_grad_(requires_grad=False), SCHEMES[0], Scratch())
        layer.rounding, layer.phase = rounding, phase
        rounding.begin_step(TrainingStep(0.5, 0.5, 20, 0.1))
        learns = phase is Phase.SOFT
        with torch.set_grad_enabled(learns):
            output = layer(x.requires_grad_(learns))
        found.append([output])
        if learns:
            output.square().sum().backward()
            values = [rounding.v.float()] if isinstance(rounding, FullRounding) else []
            found[-1] += [x.grad, rounding.theta.grad, *values]
            found[-1] += [value.grad for value in rounding.rounding_parameters()]
        assert layer._scratch.take("weight", (1,), x.dtype, x.device).untyped_storage().nbytes() <= 4 * slab
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_scratch_is_used_again():
    scratch = Scratch()
    first = scratch.take("a", (4, 6), torch.float32, torch.device("cpu"))
    again = scratch.take("a", (3, 5), torch.float32, torch.device("cpu"))
    assert (again.shape, again.data_ptr()) == ((3, 5), first.data_ptr())
    assert scratch.take("b", (3, 5), torch.float32, torch.device("cpu")).data_ptr() != first.data_ptr()
    assert scratch.take("a", (5, 5), torch.bfloat16, torch.device("cpu")).dtype == torch.bfloat16
