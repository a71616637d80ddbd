"""Triton kernels of lora_rounding, compared with the kernels in plain torch and with float64.

They run on a GPU, or without one in the interpreter of Triton, which computes on the CPU.
"""

import importlib
from dataclasses import replace

import pytest
import torch
from triton_interpreter import require_interpreter

from cbqstream.config import ReconstructionConfig
from cbqstream.numerics import slabs
from cbqstream.numerics.adaround import GAMMA, ZETA, inverse_rectified_sigmoid
from cbqstream.numerics.affine import grouped, level_range
from cbqstream.numerics.scale_search import minmax_grid
from cbqstream.rounding.lora_kernels import LowRankWeight, PlainKernels
from cbqstream.rounding.lora_rounding import LoraRounding
from cbqstream.rounding.rounding import RoundingStart, TrainingStep
from cbqstream.runtime.scratch import Scratch
from cbqstream.scheme import Scheme

pytest.importorskip("triton")
require_interpreter()
kernels = importlib.import_module("cbqstream.rounding.lora_triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FACTORS = 2.0**-9 if DEVICE == "cuda" else 1e-5
"""Precision of the gradients of the factors: a GPU multiplies tf32, the interpreter float32."""
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CASES = [  # bits, group size, symmetric, shape, rank, dtype, beta
    (4, 64, True, (70, 256), 5, BF16, 20.0),
    (3, 128, False, (40, 256), 5, BF16, 4.0),
    (4, 256, True, (10, 256), 8, FP32, 2.0),
    (2, 32, False, (33, 96), 1, FP16, 7.5),
    (3, 8, True, (7, 32), 8, BF16, 20.0),
    (2, 16, False, (260, 32), 5, FP32, 2.0),
    (8, None, False, (16, 200), 1, BF16, 3.0),
    (4, None, True, (9, 67), 5, FP32, 12.0),
    (3, None, False, (35, 131), 8, FP16, 2.0),
]


def operands(bits, size, symmetric, shape, rank, dtype):
    """A weight with trained factors, and a gradient. Many h are clipped to 0 or 1, and some weights are outside the grid."""
    generator = torch.Generator().manual_seed(bits)
    w, gradient = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    scheme = Scheme(num_bits=bits, group_size=size, symmetric=symmetric)
    scale, zero_point = minmax_grid(w * 0.9, scheme)
    theta = torch.randn(scale.shape, generator=generator) * 0.05
    a1, a2 = (
        torch.randn(shape[0], rank, generator=generator) / rank**0.5,
        torch.randn(rank, shape[1], generator=generator) * 2,
    )
    values = w, scale, scale * theta.exp(), a1, a2, *level_range(scheme, zero_point)
    values = (value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in values)
    return LowRankWeight(*values), gradient.to(DEVICE)


def in_float64(weight, gradient, beta, penalty):
    """w_hat and the gradients of theta, A1 and A2 by their formulas in float64, and each with the absolute values of its terms."""
    groups = weight.scale.shape[1]
    scale0, scale = weight.scale0.unsqueeze(-1), weight.scale.double().unsqueeze(-1)
    a1, a2 = weight.a1.double(), weight.a2.double()
    w_over_s = grouped(weight.w.float(), groups) / scale0
    v = inverse_rectified_sigmoid((w_over_s - w_over_s.floor()).double()) + grouped(a1 @ a2, groups)
    stretched = torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA
    h = stretched.clamp(0, 1)
    reached = w_over_s.floor() + h
    levels = torch.clamp(reached, weight.low, weight.high)
    gradient = grouped(gradient.double(), groups) * scale
    centered = 2 * h - 1
    of_h = gradient * (reached == levels) - 2 * beta * penalty * centered.abs() ** (beta - 1) * centered.sign()
    of_v = of_h * (h == stretched) * (ZETA - GAMMA) * torch.sigmoid(v) * (1 - torch.sigmoid(v))
    found = []
    for size in (torch.Tensor.clone, torch.abs):
        terms = size(of_v.flatten(1))
        found.append((size(levels * gradient).sum(-1), terms @ size(a2).t(), size(a1).t() @ terms))
    assert (h == 0).any()
    assert (h == 1).any()
    assert (reached != levels).any()
    return (levels * scale).flatten(1), *found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_kernels_equal_the_plain_kernels_and_float64(case):
    """Differences are within the precision that the docstring of the kernels states, and a second launch gives the same bits."""
    *about, dtype, beta = case
    weight, gradient = operands(*about, dtype)
    expected, exact, sizes = in_float64(weight, gradient, beta, 0.01)
    each_scale = weight.scale.repeat_interleave(weight.w.shape[1] // weight.scale.shape[1], 1)
    for out, step in (
        (BF16, 2.0**-7),
        (FP16, 2.0**-11),
        (FP32, 1e-6),
    ):  # the interpreter truncates to bf16, a GPU rounds
        for forward in (PlainKernels().forward, kernels.forward):
            w_hat = torch.full_like(weight.w, torch.nan, dtype=out)
            forward(weight, w_hat)
            assert ((w_hat.double() - expected).abs() <= 2e-6 * each_scale + step * expected.abs()).all()

    found = [made.backward(weight, gradient, beta, 0.01) for made in (PlainKernels(), kernels, kernels)]
    for plain, triton, again, of_all, size, precision in zip(
        *found, exact, sizes, (1e-5, FACTORS, FACTORS), strict=True
    ):
        assert torch.equal(triton, again)
        assert (triton.shape, triton.dtype) == (plain.shape, FP32)
        assert triton.is_contiguous()
        assert of_all.abs().max() > 0
        for value, allowed in ((plain, 1e-5), (triton, precision)):
            assert ((value.double() - of_all).abs() <= allowed * size).all()


def test_weights_on_grid_points_pass_their_gradient_at_the_start():
    """With A2 = 0, their h is exactly 0, the end of the range in which a gradient is passed on."""
    levels = torch.arange(-8.0, 8.0, device=DEVICE).repeat(3, 2)
    scale, a1 = torch.full((3, 2), 0.25, device=DEVICE), torch.ones(3, 2, device=DEVICE)
    weight = LowRankWeight(levels * 0.25, scale, scale, a1, torch.zeros(2, 32, device=DEVICE), -8.0, 7.0)
    out, gradient = torch.empty_like(levels), torch.ones_like(levels)
    kernels.forward(weight, out)
    assert torch.allclose(out, weight.w, rtol=0, atol=1e-7)
    plain, triton = (made.backward(weight, gradient, 20.0, 0.0)[2] for made in (PlainKernels(), kernels))
    assert (plain > 0).all()
    assert torch.allclose(triton, plain, rtol=FACTORS)


def test_a_weight_in_parts_gives_the_gradients_of_the_whole_weight(monkeypatch):
    """A part of the rows is processed at a time where the partial sums would take too much memory."""
    weight, gradient = operands(4, 64, True, (70, 128), 5, BF16)
    whole = kernels.backward(weight, gradient, 4.0, 0.01)
    launched = []
    of_rows = kernels._gradients
    monkeypatch.setattr(kernels, "_gradients", lambda *given: launched.append(given[0].w.shape[0]) or of_rows(*given))
    monkeypatch.setattr(kernels, "PARTIAL_SUMS", 1)
    theta, a1, a2 = kernels.backward(weight, gradient, 4.0, 0.01)
    assert launched == [32, 32, 6]
    assert torch.equal(theta, whole[0])
    assert torch.equal(a1, whole[1])
    assert torch.allclose(a2, whole[2], rtol=1e-5, atol=1e-5)


def test_factors_that_are_not_numbers_are_not_clamped():
    weight, _ = operands(3, 8, True, (7, 16), 8, BF16)
    weight.a1[2] = torch.nan
    out = torch.empty_like(weight.w, dtype=FP32)
    kernels.forward(weight, out)
    assert out.isnan().any(1).tolist() == [row == 2 for row in range(7)]


@pytest.mark.parametrize("slab", [16 * 96, 1 << 20])
@pytest.mark.parametrize("symmetric", [True, False])
def test_product_with_triton_kernels_equals_that_with_plain_kernels(symmetric, slab, monkeypatch):
    """The output and the gradients of the input, theta, A1 and A2 of a layer, in slabs of rows and as a whole."""
    monkeypatch.setattr(slabs, "SLAB_WEIGHTS", slab)
    scheme, found = Scheme(num_bits=3, group_size=32, symmetric=symmetric), []
    for used in (PlainKernels(), kernels):
        generator = torch.Generator().manual_seed(4)
        w = torch.randn(40, 96, generator=generator) * 0.1
        grid = (value if value is None else value.to(DEVICE) for value in minmax_grid(w, scheme))
        config = replace(ReconstructionConfig(), rounding="lora_rounding", penalty_weight=30.0)
        rounding = LoraRounding(RoundingStart(w.to(DEVICE), *grid, scheme, config, generator, Scratch()))
        rounding._kernels = used
        with torch.no_grad():
            rounding.a2.copy_(torch.randn(5, 96, generator=generator))
            rounding.theta.copy_(torch.randn(40, 3, generator=generator) * 0.05)
        rounding.begin_step(TrainingStep(0.7, 0.3, 20, 1))
        x = torch.randn(2, 7, 96, generator=generator).to(DEVICE).requires_grad_()
        output = rounding.product(x, torch.ones(40, device=DEVICE))
        output.square().sum().backward()
        found.append([output, x.grad, *(value.grad for value in rounding.learned_parameters())])
    for plain, triton in zip(*found, strict=True):
        assert plain.abs().max() > 0
        assert torch.allclose(triton, plain, rtol=max(1e-4, FACTORS), atol=FACTORS * plain.abs().max().item())
