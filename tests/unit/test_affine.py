"""Affine quantization: codes, zero points, exactness of stored values, and the search for scales."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cbqstream.errors import UsageError
from cbqstream.numerics.affine import (
    codes_of_levels,
    dequantize,
    nearest_levels,
    num_groups,
    sqnr_db,
    storable_scale,
    vanished_rows,
)
from cbqstream.numerics.scale_search import minmax_grid, search_grid
from cbqstream.records import QuantizedWeight
from cbqstream.scheme import Scheme

schemes = st.builds(
    Scheme, num_bits=st.integers(2, 8), group_size=st.sampled_from([None, 8, 16]), symmetric=st.booleans()
)


def quantize(w, scale, zero, scheme):
    levels = nearest_levels(w, scale, zero, scheme)
    return QuantizedWeight(codes_of_levels(levels, zero), scale, zero, scheme)


@given(scheme=schemes, seed=st.integers(0, 1000), size=st.sampled_from([1e-6, 0.02, 3.0]))
def test_codes_are_in_range_and_nearest_to_the_weight(scheme, seed, size):
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)) * size
    scale, zero = minmax_grid(w, scheme)
    hard = quantize(w, scale, zero, scheme)
    assert hard.codes.min() >= scheme.qmin
    assert hard.codes.max() <= scheme.qmax
    step = scale.repeat_interleave(32 // scale.shape[1], 1)
    w_hat = dequantize(hard)
    inside = (hard.codes > scheme.qmin) & (hard.codes < scheme.qmax)
    assert ((w_hat - w).abs()[inside] <= step[inside] * 0.5001).all()


@given(scheme=schemes, seed=st.integers(0, 1000))
def test_dequantized_weights_are_exact_in_float32(scheme, seed):
    """A product (q - z) * s has at most 17 significant bits, so float32 and float64 arithmetic give the same numbers."""
    w = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
    scale, zero = minmax_grid(w, scheme)
    hard = quantize(w, scale, zero, scheme)
    levels = hard.codes.double().view(4, scale.shape[1], -1)
    if zero is not None:
        levels = levels - zero.double().unsqueeze(-1)
    exact = (levels * scale.double().unsqueeze(-1)).flatten(1)
    assert torch.equal(dequantize(hard).double(), exact)


@given(st.floats(1e-30, 1e6))
def test_storable_scales_are_exact_in_bfloat16_float16_and_float32(value):
    scale = storable_scale(torch.tensor([value]))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(scale.to(dtype).float(), scale)
    assert scale >= 2.0**-17


def test_asymmetric_weight_of_a_worked_example():
    """In 2 bits, the range [-1, 2] has the scale 1. The weight -1 has the code qmin = -2, so the zero point is -1."""
    scheme = Scheme(num_bits=2, group_size=None, symmetric=False)
    w = torch.tensor([[-1.0, 0.2, 0.9, 2.0]])
    scale, zero = minmax_grid(w, scheme)
    assert scale.item() == 1.0
    assert zero.item() == -1
    assert quantize(w, scale, zero, scheme).codes.tolist() == [[-2, -1, 0, 1]]


def test_rows_of_zeros_are_dequantized_to_zeros():
    for symmetric in (True, False):
        scheme = Scheme(num_bits=4, group_size=None, symmetric=symmetric)
        w = torch.zeros(2, 16)
        for grid in (minmax_grid(w, scheme), search_grid(w, torch.ones(16), scheme)):
            assert torch.equal(dequantize(quantize(w, *grid, scheme)), w)


def test_group_size_that_does_not_divide_the_columns_is_refused():
    with pytest.raises(ValueError, match="128 does not divide 576"):
        num_groups(576, 128)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_search_reduces_the_weighted_error_of_minmax_by_at_least_5_percent(num_bits, symmetric):
    scheme = Scheme(num_bits=num_bits, group_size=16, symmetric=symmetric)
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(24, 64, generator=generator) ** 3
    moment = torch.rand(64, generator=generator) * 10

    def error(grid):
        return (((dequantize(quantize(w, *grid, scheme)) - w) ** 2) * moment).sum()

    assert error(search_grid(w, moment, scheme)) < 0.95 * error(minmax_grid(w, scheme))


def test_sqnr_db_of_worked_examples_and_its_limits():
    w_OI = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    scheme = Scheme(num_bits=8, group_size=None)
    off = QuantizedWeight(torch.tensor([[3, 3], [0, 0]], dtype=torch.int8), torch.ones(2, 1), None, scheme)
    exact = QuantizedWeight(torch.tensor([[3, 4], [0, 0]], dtype=torch.int8), torch.ones(2, 1), None, scheme)
    assert sqnr_db(w_OI, off) == pytest.approx(10 * math.log10(25))
    assert sqnr_db(w_OI, exact) == 200
    assert sqnr_db(torch.zeros(2, 2), exact) == -200
    assert sqnr_db(torch.zeros(2, 2), replace(exact, codes=torch.zeros(2, 2, dtype=torch.int8))) == 200


def test_a_group_size_that_no_group_fits_names_the_layer_to_leave_out():
    """A small side layer must not make the user change the group size of the whole model."""
    with pytest.raises(UsageError) as caught:
        Scheme(num_bits=4, group_size=32).require_whole_groups("model.layers.0.mlp.side_gate.weight", 2)
    assert str(caught.value) == (
        "group size 32 does not divide the 2 columns of model.layers.0.mlp.side_gate.weight."
        " Leave the layer out with --ignore side_gate, or use -1 (per channel)."
    )


def test_rows_vanish_if_all_their_weights_are_below_half_of_the_smallest_scale():
    w_OI = torch.full((4, 8), 0.1)
    w_OI[1] = 3e-6
    w_OI[2] = 0
    scheme = Scheme(num_bits=4, group_size=None)
    scale, _ = minmax_grid(w_OI, scheme)
    codes = (w_OI / scale).round().to(torch.int8)
    assert vanished_rows(w_OI, QuantizedWeight(codes, scale, None, scheme)) == 1
    assert vanished_rows(w_OI[:1], QuantizedWeight(codes[:1], scale[:1], None, scheme)) == 0
