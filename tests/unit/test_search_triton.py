"""Triton kernel of the search of a grid, compared with the search in plain torch."""

import importlib

import pytest
import torch
from triton_interpreter import require_interpreter

from cbqstream.numerics.affine import grouped, nearest_levels
from cbqstream.numerics.scale_search import ratios, search_grid
from cbqstream.scheme import Scheme

pytest.importorskip("triton")
require_interpreter()
kernels = importlib.import_module("cbqstream.rounding.search_triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def weighted_errors(w, second_moment, grid, scheme):
    """Error of each group with a grid, in float64."""
    scale, zero_point = grid
    w_hat = nearest_levels(w, scale, zero_point, scheme).double() * scale.double().unsqueeze(-1)
    return (
        (w_hat - grouped(w.double(), scale.shape[1])).square() * second_moment.double().view(scale.shape[1], -1)
    ).sum(-1)


@pytest.mark.parametrize(
    ("scheme", "shape", "dtype"),
    [
        (Scheme(num_bits=4, group_size=64), (20, 256), torch.bfloat16),
        (Scheme(num_bits=3, group_size=8), (7, 64), torch.float32),
        (Scheme(num_bits=2, group_size=32), (70, 96), torch.float16),
        (Scheme(num_bits=8, group_size=None), (5, 200), torch.bfloat16),
        (Scheme(num_bits=4, group_size=128, symmetric=False), (17, 256), torch.bfloat16),
        (Scheme(num_bits=2, group_size=None, symmetric=False), (6, 67), torch.float32),
    ],
    ids=str,
)
def test_error_is_that_of_the_plain_search(scheme, shape, dtype):
    """Nearly all grids are the same; where two candidates are equally good, the other one may be taken."""
    generator = torch.Generator().manual_seed(scheme.num_bits)
    w = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    w[0, :8] = 0.3  # outliers
    w[1] = 0
    w[2] = w[2].abs()
    second_moment = torch.rand(shape[1], generator=generator)
    expected = search_grid(w, second_moment, scheme)
    found = kernels.search_grid(w.to(DEVICE), second_moment.to(DEVICE), scheme)
    found = tuple(None if value is None else value.cpu() for value in found)
    same = torch.ones_like(expected[0], dtype=torch.bool)
    for value, of_plain in zip(found, expected, strict=True):
        assert (value is None) == (of_plain is None)
        if value is not None:
            assert (value.shape, value.dtype) == (of_plain.shape, of_plain.dtype)
            same &= value == of_plain
    assert same.float().mean() > 0.95
    assert len(found[0].unique()) > 2
    best, error = (weighted_errors(w, second_moment, grid, scheme) for grid in (expected, found))
    assert (error <= best * (1 + 1e-5)).all()
    assert best[0, 0] > 0


def test_grids_are_the_first_of_equal_candidates():
    """A group of zeros has the same error with every candidate; the first is the full range."""
    scheme = Scheme(num_bits=4, group_size=16)
    w = torch.zeros(3, 32, device=DEVICE)
    scale, _ = kernels.search_grid(w, torch.ones(32, device=DEVICE), scheme)
    assert torch.equal(scale.cpu(), search_grid(w.cpu(), torch.ones(32), scheme)[0])
    assert next(iter(ratios(scheme))) == (1.0, 1.0)
