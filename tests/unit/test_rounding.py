"""Rounding methods: their registry, the weights with which they start, their gradients, and the product with a soft weight."""

from dataclasses import replace
from functools import reduce
from operator import add
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional

from cbqstream.config import ReconstructionConfig, RoundingName
from cbqstream.numerics import slabs
from cbqstream.numerics.adaround import inverse_rectified_sigmoid, rectified_sigmoid, rounding_penalty
from cbqstream.numerics.affine import codes_of_levels, dequantize, grouped, level_range, nearest_levels
from cbqstream.numerics.scale_search import minmax_grid
from cbqstream.rounding.cost import RoundingCost
from cbqstream.rounding.lora_rounding import LoraRounding
from cbqstream.rounding.product import rounded_linear
from cbqstream.rounding.registry import METHODS, method_of
from cbqstream.rounding.rounding import RoundingStart, TrainingStep
from cbqstream.rounding.signround import SignRound
from cbqstream.rounding.signround_kernels import PlainKernels
from cbqstream.runtime.scratch import Scratch
from cbqstream.scheme import Scheme
from cbqstream.windows.quantized_linear import Phase, QuantizedLinear

CPU = torch.device("cpu")
ROWS, COLUMNS = 12, 32
SCHEMES = [
    Scheme(num_bits=2, group_size=8, symmetric=False),
    Scheme(num_bits=4, group_size=None, symmetric=True),
    Scheme(num_bits=3, group_size=16, symmetric=True),
]


def make(scheme, method="signround", seed=0, dtype=torch.float32):
    """The rounding of a random weight [12, 32], as it starts."""
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(ROWS, COLUMNS, generator=generator) * 0.1).to(dtype)
    config = ReconstructionConfig(rounding=method)
    return method_of(config)(RoundingStart(w, *minmax_grid(w, scheme), scheme, config, generator, Scratch()))


def test_the_registry_has_every_method_that_the_settings_can_name():
    assert set(METHODS) == set(get_args(RoundingName))
    for name, method in METHODS.items():
        assert method.name == name
        assert method_of(ReconstructionConfig(rounding=name)) is method


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_whole_interface_before_the_first_training_step(method):
    rounding, rows = make(SCHEMES[0], method), slice(2, 7)
    nearest = nearest_levels(rounding.weight, rounding.scale0, rounding.zero_point, SCHEMES[0])
    with torch.no_grad():
        assert torch.equal(rounding.levels(rows, rounding.scale0[rows]), nearest[rows])
        assert torch.equal(rounding.scale_of(rows), rounding.scale0[rows])
        part = rounding.soft_rows(rows, torch.bfloat16)
        assert (part.shape, part.dtype) == ((5, COLUMNS), torch.bfloat16)
        assert torch.equal(part, rounding.soft()[rows].to(torch.bfloat16))
        gradients = rounding.gradients(rows, torch.ones(5, COLUMNS))
    hard = rounding.harden()
    assert torch.equal(hard.codes, codes_of_levels(nearest, rounding.zero_point))
    assert torch.equal(hard.scale, rounding.scale0)
    assert rounding.changed() == (0, ROWS * COLUMNS)
    assert rounding.large_state() == {}
    assert set(rounding.state()) == {"scale0", "zero_point", *rounding.learned}

    learned = rounding.learned_parameters()
    assert [id(value) for value in learned] == [id(getattr(rounding, name)) for name in rounding.learned]
    assert [id(value) for value in rounding.rounding_parameters()] == [id(value) for value in learned[1:]]
    for value, by_rows, gradient in zip(learned, rounding.learned.values(), gradients, strict=True):
        assert gradient.shape == (value[rows] if by_rows else value).shape
    x = torch.randn(3, COLUMNS, requires_grad=True)
    rounding.product(x, None).sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in (x, *learned))


def test_costs_of_layers_are_summed_field_by_field():
    """But the memory for a tile is that of one layer after the other."""
    one, other = RoundingCost(1, 2, 3, 4, 5, 6, 7), RoundingCost(10, 20, 30, 40, 50, 60, 4)
    assert one + other == RoundingCost(11, 22, 33, 44, 55, 66, 7)
    assert one + RoundingCost() == one
    for method in METHODS.values():
        config = ReconstructionConfig(rounding=method.name)
        cost = method.cost(config, 4, 8)
        sums = RoundingCost(*(3 * getattr(cost, name) for name in RoundingCost.__slots__))
        assert reduce(add, [cost] * 3) == replace(sums, tile_bytes=cost.tile_bytes)
        assert (cost == RoundingCost()) == (method.name == "nearest")
        assert 0 <= cost.offloaded_bytes <= cost.resident_bytes


def test_inverse_of_the_rectified_sigmoid():
    h = torch.linspace(0, 1, 101)
    assert torch.allclose(rectified_sigmoid(inverse_rectified_sigmoid(h)), h, atol=1e-6)


def test_rounding_penalty_is_zero_if_every_weight_is_rounded_up_or_down():
    assert rounding_penalty(torch.tensor([0.0, 1.0, 1.0]), 4.0) == 0
    assert rounding_penalty(torch.tensor([0.5]), 4.0) == 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("method", ["nearest", "lora_rounding", "signround"])
def test_hard_weight_of_every_method_starts_rounded_to_nearest(method, scheme):
    rounding = make(scheme, method)
    nearest = make(scheme, "nearest")
    assert torch.equal(rounding.harden().codes, nearest.harden().codes)
    assert rounding.changed() == (0, ROWS * COLUMNS)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_soft_weight_of_lora_rounding_starts_as_the_original_weight_within_the_grid(scheme):
    rounding = make(scheme, "lora_rounding")
    w, scale = rounding.weight, rounding.scale0
    low, high = level_range(scheme, rounding.zero_point)
    levels = grouped(w, scale.shape[1]) / scale.unsqueeze(-1)
    inside = ((levels >= low) & (levels <= high)).flatten(1)
    assert inside.float().mean() > 0.8
    assert torch.allclose(rounding.soft()[inside], w[inside], atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_soft_weight_of_signround_is_its_hard_weight_before_the_scale_is_rounded(scheme):
    rounding = make(scheme, "signround")
    assert isinstance(rounding, SignRound)
    rounding.v.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(rounding.soft(), dequantize(rounding.harden()), atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_signround_gradients_equal_autograd_with_a_straight_through_estimator(scheme):
    """The gradient of theta and the step of v are compared with autograd of the formula with a detached rounding error."""
    rounding = make(scheme, "signround")
    assert isinstance(rounding, SignRound)
    rounding.v.uniform_(-0.4, 0.4, generator=torch.Generator().manual_seed(2))
    low, high = level_range(scheme, rounding.zero_point)
    grad = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    groups = rounding.scale0.shape[1]

    theta = torch.full_like(rounding.scale0, 0.01, requires_grad=True)
    v = rounding.v.float().requires_grad_()
    scale = (rounding.scale0 * theta.exp()).unsqueeze(-1)
    x = grouped(rounding.weight, groups) / scale + grouped(v, groups)
    levels = torch.clamp(x + (x.round() - x).detach(), low, high)
    expected = (levels * scale).flatten(1)
    expected.backward(grad)

    with torch.no_grad():
        rounding.theta.copy_(theta)
    rounding._step, rounding._kernels = 0.05, PlainKernels()
    assert torch.allclose(rounding.soft(), expected, atol=1e-7)
    rounded_linear(torch.eye(COLUMNS), rounding, None, *rounding.learned_parameters()).backward(grad.t())
    assert torch.allclose(rounding.theta.grad, theta.grad, atol=1e-5)
    moved = (v.detach() - 0.05 * v.grad.sign()).clamp(-0.5, 0.5)
    assert torch.allclose(rounding.v.float(), moved, atol=1e-3)


def test_signround_values_do_not_move_without_gradients():
    rounding = make(SCHEMES[0], "signround")
    assert isinstance(rounding, SignRound)
    rounding.begin_step(TrainingStep(0.0, 1.0, 10, 1))
    with torch.no_grad():
        rounding.product(torch.eye(COLUMNS), None)
    assert not rounding.v.any()


def test_signround_values_move_by_max_shift_in_a_window_with_gradients_of_one_sign():
    rounding = make(SCHEMES[1], "signround")
    assert isinstance(rounding, SignRound)
    steps = 20
    for step in range(steps):
        rounding.begin_step(TrainingStep(step / steps, 1 - step / steps, steps, 1))
        rounding.product(torch.eye(COLUMNS), None).sum().backward()
    assert rounding.v.abs().max() == pytest.approx(ReconstructionConfig().max_shift, rel=1.5 / steps)


def test_hard_weight_is_rounded_with_the_stored_scale():
    """The learned scale is rounded to a bfloat16 value first, and the codes are the nearest ones for that value."""
    rounding = make(SCHEMES[1], "signround")
    with torch.no_grad():
        rounding.theta += 0.0123
    hard = rounding.harden()
    assert torch.equal(hard.scale, hard.scale.to(torch.bfloat16).float())
    nearest = (rounding.weight / hard.scale).round().clamp(-8, 7)
    assert torch.equal(hard.codes.float(), nearest)


@pytest.mark.parametrize("method", ["nearest", "lora_rounding", "signround"])
def test_loading_the_state_of_another_rounding_gives_the_same_hard_weight(method):
    rounding, fresh = make(SCHEMES[0], method), make(SCHEMES[0], method, seed=0)
    with torch.no_grad():
        rounding.theta += 0.05
        if isinstance(rounding, SignRound):
            rounding.v += 0.3
        if isinstance(rounding, LoraRounding):
            rounding.a2 += 1.0
    state = rounding.state() | rounding.large_state()
    assert not torch.equal(fresh.harden().scale, rounding.harden().scale)
    fresh.load(state)
    assert torch.equal(fresh.harden().codes, rounding.harden().codes)
    assert torch.equal(fresh.harden().scale, rounding.harden().scale)


@pytest.mark.parametrize("beta", [20.0, 2.0])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_lora_rounding_gradients_equal_autograd_in_float64(scheme, beta):
    """The gradients of theta, A1 and A2, with the penalty, are compared with autograd of the formulas."""
    rounding, generator = make(scheme, "lora_rounding"), torch.Generator().manual_seed(7)
    assert isinstance(rounding, LoraRounding)
    groups, bounds = rounding.scale0.shape[1], level_range(scheme, rounding.zero_point)
    theta, a1, a2 = (
        (torch.randn(value.shape, generator=generator) * 0.3).double().requires_grad_()
        for value in rounding.learned_parameters()
    )
    gradient = torch.randn(ROWS, COLUMNS, generator=generator)
    low, high = (bound.double() if isinstance(bound, torch.Tensor) else bound for bound in bounds)

    w_over_s = grouped(rounding.weight.double(), groups) / rounding.scale0.double().unsqueeze(-1)
    v0 = inverse_rectified_sigmoid(w_over_s - w_over_s.floor())
    h = rectified_sigmoid(v0 + grouped(a1 @ a2, groups))
    levels = torch.clamp(w_over_s.floor() + h, low, high)
    expected = (levels * (rounding.scale0.double() * theta.exp()).unsqueeze(-1)).flatten(1)
    ((expected * gradient.double()).sum() + 0.5 * rounding_penalty(h, beta)).backward()

    with torch.no_grad():
        for value, exact in zip(rounding.learned_parameters(), (theta, a1, a2), strict=True):
            value.copy_(exact)
    rounding._beta, rounding._penalty_per_weight = beta, 0.5 / (ROWS * COLUMNS)
    rounded_linear(torch.eye(COLUMNS), rounding, None, *rounding.learned_parameters()).backward(gradient.t())
    assert torch.allclose(rounding.soft().double(), expected, atol=1e-5)
    for found, exact in zip(rounding.learned_parameters(), (theta, a1, a2), strict=True):
        assert exact.grad.abs().max() > 0
        assert torch.allclose(found.grad.double(), exact.grad, atol=1e-5 * exact.grad.abs().max().item())


def test_lora_rounding_penalty_is_shared_by_all_weights_of_all_trained_layers():
    rounding = make(SCHEMES[0], "lora_rounding")
    assert isinstance(rounding, LoraRounding)
    rounding.begin_step(TrainingStep(0.0, 1.0, 20, 4))
    weight = ReconstructionConfig().penalty_weight
    assert (rounding._beta, rounding._penalty_per_weight) == (20.0, pytest.approx(weight / 4 / (ROWS * COLUMNS)))
    rounding.begin_step(TrainingStep(1.0, 0.0, 20, 4))
    assert rounding._beta == 2.0


def test_a_rounding_keeps_the_dtype_of_the_weight_and_gives_a_float32_soft_weight():
    rounding = make(SCHEMES[0], "signround", dtype=torch.bfloat16)
    assert rounding.weight.dtype == torch.bfloat16
    assert rounding.soft().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["nearest", "lora_rounding", "signround"])
def test_product_and_its_gradients_equal_those_of_a_linear_layer_with_the_soft_weight(method, dtype):
    """The output and the gradients of the input and of the learned parameters are equal bit for bit."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 7, COLUMNS, generator=generator).to(dtype)
    bias = torch.randn(ROWS, generator=generator).to(dtype)
    grad = torch.randn(2, 7, ROWS, generator=generator).to(dtype)

    rounding = make(SCHEMES[0], method)
    x_of_linear, weight = x.clone().requires_grad_(), rounding.soft().detach().to(dtype).requires_grad_()
    expected = functional.linear(x_of_linear, weight, bias)
    expected.backward(grad)
    x_of_product = x.clone().requires_grad_()
    rounding.begin_step(TrainingStep(0.0, 1.0, 20, 1))
    actual = rounding.product(x_of_product, bias)
    actual.backward(grad)
    assert torch.equal(actual, expected)
    assert torch.equal(x_of_product.grad, x_of_linear.grad)

    if method == "nearest":
        found = (weight.grad.float() * rounding.soft().detach()).unflatten(1, (4, 8)).sum(-1)
        assert torch.allclose(rounding.theta.grad, found, rtol=1e-5, atol=1e-5)
        return
    other = make(SCHEMES[0], method)
    other.begin_step(TrainingStep(0.0, 1.0, 20, 1))
    with torch.no_grad():
        gradients = other.gradients(slice(0, ROWS), weight.grad)
    for value, expected in zip(rounding.learned_parameters(), gradients, strict=True):
        assert torch.equal(value.grad, expected)
    if isinstance(other, SignRound):
        assert torch.equal(rounding.v, other.v)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((4096, 4096), [4096]),
        ((8192, 28672), [2048] * 4),  # down_proj of Llama 70B
        ((16384, 53248), [1024] * 16),  # down_proj of Llama 405B
        ((22016, 8192), [7424, 7424, 7168]),
        ((4, 1 << 25), [2, 2]),
        ((3, 1 << 27), [1, 1, 1]),
    ],
)
def test_slabs_are_equal_and_have_multiples_of_256_rows(shape, sizes):
    found = list(slabs.slabs(shape))
    assert [rows.stop - rows.start for rows in found] == sizes
    assert [rows.start for rows in found] == [sum(sizes[:index]) for index in range(len(sizes))]


@pytest.mark.parametrize("method", ["lora_rounding", "signround"])
@pytest.mark.parametrize("phase", list(Phase))
def test_a_weight_in_slabs_of_rows_gives_the_output_and_gradients_of_the_whole_weight(monkeypatch, method, phase):
    """Slabs of five rows are compared with a slab of all rows: the output, the gradients, and the rounding values."""
    found = []
    for slab in (5 * COLUMNS, 1 << 20):
        monkeypatch.setattr(slabs, "SLAB_WEIGHTS", slab)
        rounding, generator = make(SCHEMES[0], method), torch.Generator().manual_seed(5)
        x = torch.randn(2, 7, COLUMNS, generator=generator)
        linear = nn.Linear(COLUMNS, ROWS)
        linear.weight, linear.bias = nn.Parameter(rounding.weight), nn.Parameter(torch.randn(ROWS, generator=generator))
        layer = QuantizedLinear(linear.requires_grad_(requires_grad=False), SCHEMES[0], Scratch())
        layer.rounding, layer.phase = rounding, phase
        rounding.begin_step(TrainingStep(0.5, 0.5, 20, 1))
        learns = phase is Phase.SOFT
        with torch.set_grad_enabled(learns):
            output = layer(x.requires_grad_(learns))
        found.append([output])
        if learns:
            output.square().sum().backward()
            values = [rounding.v.float()] if isinstance(rounding, SignRound) else []
            found[-1] += [x.grad, *values, *(value.grad for value in rounding.learned_parameters())]
        assert layer._scratch.take("weight", (1,), x.dtype, x.device).untyped_storage().nbytes() <= 4 * slab
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_scratch_reuses_the_buffer_of_a_purpose():
    scratch = Scratch()
    first = scratch.take("a", (4, 6), torch.float32, CPU)
    again = scratch.take("a", (3, 5), torch.float32, CPU)
    assert (again.shape, again.data_ptr()) == ((3, 5), first.data_ptr())
    assert scratch.take("b", (3, 5), torch.float32, CPU).data_ptr() != first.data_ptr()
    assert scratch.take("a", (5, 5), torch.bfloat16, CPU).dtype == torch.bfloat16
