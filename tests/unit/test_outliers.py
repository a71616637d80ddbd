"""Outlier preprocessing against examples worked by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cbqstream.config import TransformConfig
from cbqstream.numerics.outliers import OutlierRule, channel_scales, largest_reserved, power_of_two, truncated

PAPER = OutlierRule.of(TransformConfig(variant="paper"))
HUAWEI = OutlierRule.of(TransformConfig(variant="huawei"))


def reserved(values, rule=PAPER):
    return largest_reserved(torch.tensor(values), rule)


def test_one_candidate_is_an_outlier():
    # Q1 = 2, Q3 = 4, T = 4 + 1.5 * 2 = 7: only 100 is above it
    assert reserved([1.0, 2.0, 3.0, 4.0, 100.0]) == 4.0


def test_candidates_are_split_at_the_widest_gap():
    # Q1 = 2.75, Q3 = 6.25 (of 0..8 and three more: ranks 2.5 and 7.5), candidates 20, 21, 60:
    # none reserved (20 - 8)^2 = 144; 20 reserved 1; 20 and 21 reserved 39^2 - 0.25 = 1520.75, the largest
    values = [*map(float, range(9)), 20.0, 21.0, 60.0]
    assert reserved(values) == 21.0


def test_variance_of_the_reserved_counts_against_a_split():
    # candidates 100, 200, 310: none reserved (100 - 8)^2 = 8464; {100} 100^2 - 0 = 10000; {100, 200} 110^2 - lambda2 * 2500
    values = [*map(float, range(9)), 100.0, 200.0, 310.0]
    assert reserved(values) == 100.0  # 12100 - 2500 = 9600
    light = OutlierRule(lambda1=1.5, lambda2=0.5)
    assert reserved(values, light) == 200.0  # 12100 - 1250 = 10850


def test_huawei_has_other_quantiles_and_a_linear_gap():
    # 0..8, 20, 21, 60: Q1 = 2.2, Q3 = 10.4 at .2 and .8, T = 22.7: 60 is the only candidate
    values = [*map(float, range(9)), 20.0, 21.0, 60.0]
    assert reserved(values, HUAWEI) == 21.0
    # gaps 92, 100, 110 - 2500: squared they would reserve 100 as well; linear too
    assert reserved([*map(float, range(20)), 100.0, 200.0, 310.0], HUAWEI) == 100.0


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
def test_nothing_stands_out(values):
    assert reserved(values) is None


def test_weights_are_truncated_with_their_sign():
    w = torch.tensor([[1.0, -2.0, 3.0, -4.0], [2.0, -3.0, 1.0, -100.0]], dtype=torch.bfloat16)
    expected = w.clone()
    expected[1, 3] = -4.0
    assert torch.equal(truncated(w, PAPER), expected)
    assert w[1, 3] == -100
    plain = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    assert truncated(plain, PAPER) is plain


def test_outlier_channels_get_the_root_of_their_ratio():
    high = torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 2.0])
    low = torch.tensor([-1.0, -1.0, -1.0, -1.0, -64.0, -1.0])
    assert channel_scales(low, high, PAPER).tolist() == [1, 1, 1, 1, 4, 1]  # sqrt(64 / 4)
    scales = channel_scales(low, high, HUAWEI)  # negative tail: 1 1 1 1 64 1, reserved 1
    assert scales.tolist() == pytest.approx([1, 1, 1, 1, 64**0.7, 1])


def test_a_tail_that_is_zero_has_no_outliers():
    zero, high = torch.zeros(6), torch.tensor([1.0, 2.0, 3.0, 4.0, 64.0, 2.0])
    assert channel_scales(zero, high, HUAWEI)[4] == pytest.approx(16**0.7)
    assert channel_scales(zero, zero, HUAWEI).tolist() == [1.0] * 6
    one_alive = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0])  # nothing to bring it to
    assert channel_scales(torch.zeros(5), one_alive, PAPER).tolist() == [1.0] * 5


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=60))
def test_the_split_is_where_the_formula_is_largest(values):
    x = torch.tensor(values)
    q1, q3 = torch.quantile(x, torch.tensor([0.25, 0.75])).tolist()
    candidates = sorted(v for v in x.tolist() if v > q3 + 1.5 * (q3 - q1))
    found = largest_reserved(x, PAPER)
    if not candidates:
        assert found is None
        return
    below = max([v for v in x.tolist() if v <= q3 + 1.5 * (q3 - q1)], default=0.0)

    def measure(split):
        kept = torch.tensor(candidates[:split], dtype=torch.float64)
        gap = candidates[split] - (candidates[split - 1] if split else below)
        return gap**2 - (kept.var(unbiased=False).item() if split else 0.0)

    best = max(measure(split) for split in range(len(candidates)))
    choices = [below, *candidates[:-1]]
    chosen = min(range(len(choices)), key=lambda i: abs(choices[i] - found))
    assert measure(chosen) == pytest.approx(best, rel=1e-6, abs=1e-3)


def test_powers_of_two():
    assert power_of_two(torch.tensor([1.0, 1.4, 1.5, 3.0, 20.0])).tolist() == [1, 1, 2, 4, 16]
