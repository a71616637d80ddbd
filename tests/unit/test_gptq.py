"""GPTQ: levels against a plain computation in float64, the correction for the difference of two streams, and Gram matrices of all kinds."""

import pytest
import torch

from cbqstream.numerics.affine import level_range, nearest_levels, num_groups
from cbqstream.numerics.gptq import InverseFactor, NotPositiveDefiniteError, correction, correction_share, gptq_levels
from cbqstream.numerics.scale_search import minmax_grid
from cbqstream.scheme import Scheme

ROWS, COLUMNS, TOKENS = 24, 160, 400
SCHEMES = [
    Scheme(num_bits=2, group_size=16, symmetric=False),
    Scheme(num_bits=3, group_size=32, symmetric=True),
    Scheme(num_bits=4, group_size=None, symmetric=False),
    Scheme(num_bits=4, group_size=None, symmetric=True),
]


def correlated(seed, tokens=TOKENS):
    """Inputs [T, I] whose columns are correlated and of different size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    return mixed * torch.rand(COLUMNS, generator=generator) * 0.1


def weight(seed=7):
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.1


def dequantized(levels, scale):
    return (levels * scale.unsqueeze(-1)).flatten(1)


def error(w, w_hat, gram):
    return float((((w_hat - w) @ gram) * (w_hat - w)).sum())


def slow_levels(w, gram, scale, zero_point, scheme, damping, order):
    """GPTQ as it is defined, in float64: round a column, and move the columns that are left to the least error of the output.

    For every column the rest of the Gram matrix is inverted anew.
    """
    w, h = w.double().clone(), gram.double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    size = COLUMNS // scale.shape[1]
    low, high = (torch.as_tensor(bound).expand(ROWS, scale.shape[1], 1) for bound in level_range(scheme, zero_point))
    levels = torch.empty(ROWS, COLUMNS)
    left = list(order)
    while left:
        column, group = left[0], left[0] // size
        s = scale[:, group].double()
        level = torch.clamp((w[:, column] / s).round(), low[:, group, 0], high[:, group, 0])
        levels[:, column] = level
        inverse = torch.linalg.inv(h[left][:, left])
        w[:, left] -= ((w[:, column] - level * s) / inverse[0, 0]).unsqueeze(1) * inverse[0]
        left = left[1:]
    return levels.view(ROWS, scale.shape[1], -1)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_levels_equal_those_of_a_plain_computation(scheme, act_order):
    """They may differ where float32 rounds the other way, and then in the columns behind."""
    w, x = weight(), correlated(0)
    gram, grid = x.T @ x, minmax_grid(w, scheme)
    order = gram.diagonal().argsort(descending=True).tolist() if act_order else range(COLUMNS)
    expected = slow_levels(w, gram, *grid, scheme, 0.01, order)
    found = gptq_levels(w, InverseFactor.of(gram, 0.01, act_order=act_order), *grid, scheme)
    assert found.shape == (ROWS, num_groups(COLUMNS, scheme.group_size), COLUMNS // grid[0].shape[1])
    assert (found != expected).float().mean() < 0.01
    errors = [error(w, dequantized(levels, grid[0]), gram) for levels in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_independent_inputs_give_the_nearest_levels(scheme):
    w, grid = weight(), minmax_grid(weight(), scheme)
    gram = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)).add(0.1).diag()
    found = gptq_levels(w, InverseFactor.of(gram, 0.01), *grid, scheme)
    assert torch.equal(found, nearest_levels(w, *grid, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_error_is_below_that_of_the_nearest_levels_and_lowest_in_the_order_of_the_inputs(scheme):
    w, x = weight(), correlated(2)
    gram, grid = x.T @ x, minmax_grid(w, scheme)
    nearest = error(w, dequantized(nearest_levels(w, *grid, scheme), grid[0]), gram)
    stored, ordered = (
        error(
            w, dequantized(gptq_levels(w, InverseFactor.of(gram, 0.01, act_order=order), *grid, scheme), grid[0]), gram
        )
        for order in (False, True)
    )
    assert ordered < stored < 0.8 * nearest


def test_a_column_without_input_is_rounded_to_nearest_and_changes_no_other_column():
    scheme, w, x = SCHEMES[2], weight(), correlated(3)
    x[:, [5, 90]] = 0
    grid = minmax_grid(w, scheme)
    found = gptq_levels(w, InverseFactor.of(x.T @ x, 0.01), *grid, scheme).flatten(1)
    nearest = nearest_levels(w, *grid, scheme).flatten(1)
    assert torch.equal(found[:, [5, 90]], nearest[:, [5, 90]])
    other = w.clone()
    other[:, [5, 90]] = 0
    again = gptq_levels(other, InverseFactor.of(x.T @ x, 0.01), *grid, scheme).flatten(1)
    rest = [column for column in range(COLUMNS) if column not in (5, 90)]
    assert torch.equal(again[:, rest], found[:, rest])


def test_inputs_that_are_all_zero_give_the_nearest_levels():
    w, grid = weight(), minmax_grid(weight(), SCHEMES[1])
    factor = InverseFactor.of(torch.zeros(COLUMNS, COLUMNS), 0.01)
    assert torch.equal(gptq_levels(w, factor, *grid, SCHEMES[1]), nearest_levels(w, *grid, SCHEMES[1]))


def test_the_damping_is_raised_until_the_matrix_is_positive_definite():
    x = correlated(4, tokens=20)
    factor = InverseFactor.of(x.T @ x, 0.0)
    assert 0 < factor.damping <= 0.1
    assert factor.upper.isfinite().all()


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (-torch.eye(COLUMNS), "not positive definite"),
        (torch.full((COLUMNS, COLUMNS), torch.nan), "not finite"),
        (torch.full((COLUMNS, COLUMNS), torch.inf), "not finite"),
    ],
)
def test_a_matrix_without_a_factor_is_refused(gram, message):
    with pytest.raises(NotPositiveDefiniteError, match=message):
        InverseFactor.of(gram, 0.01)


def test_the_corrected_weight_is_the_least_squares_solution():
    """The outputs for the inputs of the reference stream are fitted with the inputs of the quantized stream."""
    w, reference = weight(), correlated(5)
    x = reference + 0.3 * correlated(6)
    found = w + correction(w, (reference - x).T @ x, InverseFactor.of(x.T @ x, 0.0))
    expected = torch.linalg.lstsq(x.double(), reference.double() @ w.T.double()).solution.T
    assert torch.allclose(found.double(), expected, atol=1e-3)


def test_the_share_of_the_correction_has_the_least_error_on_held_out_tokens():
    w = weight()
    noise = [0.5 * correlated(seed, tokens) for seed, tokens in ((11, 200), (12, 80))]
    references = [correlated(8, 200), correlated(9, 80)]
    (x, held_out), (reference, reference_held_out) = [r + n for r, n in zip(references, noise, strict=True)], references
    d = correction(w, (reference - x).T @ x, InverseFactor.of(x.T @ x, 0.01))
    share = correction_share(w, d, held_out.T @ held_out, (reference_held_out - held_out).T @ held_out)

    def loss(a):
        return float((reference_held_out @ w.T - held_out @ (w + a * d).T).square().sum())

    assert 0.05 < share < 0.95
    assert loss(share) < min(loss(share - 0.01), loss(share + 0.01), loss(0), loss(1))


def test_the_share_is_0_without_a_correction_and_never_outside_0_to_1():
    w, gram = weight(), correlated(10).T @ correlated(10)
    assert correction_share(w, torch.zeros_like(w), gram, gram) == 0
    d = correction(w, gram, InverseFactor.of(gram, 0.01))
    assert correction_share(w, d, gram, 5 * gram) == 1
    assert correction_share(w, d, gram, -gram) == 0
