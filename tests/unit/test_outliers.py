"""Detection of outliers and its two uses, truncation and channel scales, against worked examples."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cbqstream.config import TransformConfig
from cbqstream.numerics.outliers import OutlierRule, channel_scales, largest_reserved, power_of_two, truncated

PAPER = OutlierRule.of(TransformConfig(smoothing_rule="paper"))
HUAWEI = OutlierRule.of(TransformConfig(smoothing_rule="huawei"))


def reserved(values, rule=PAPER):
    return largest_reserved(torch.tensor(values), rule)


def test_a_single_candidate_is_an_outlier():
    # Q1 = 2, Q3 = 4, T = 4 + 1.5 * 2 = 7: 100 is the only candidate
    assert reserved([1.0, 2.0, 3.0, 4.0, 100.0]) == 4.0


def test_candidates_are_split_at_the_widest_gap():
    # Q1 = 2.75, Q3 = 8 + 0.25 * 12 = 11, T = 11 + 1.5 * 8.25 = 23.375: 60 is the only candidate
    assert reserved([*map(float, range(9)), 20.0, 21.0, 60.0]) == 21.0
    # Q1 = 5.5, Q3 = 16.5, T = 16.5 + 1.5 * 11 = 33: the candidates are 40, 41 and 80
    # M is (40 - 19)^2 = 441 if none is reserved, (41 - 40)^2 = 1 with {40}, and 39^2 - 0.25 = 1520.75 with {40, 41}
    assert reserved([*map(float, range(20)), 40.0, 41.0, 80.0]) == 41.0


def test_variance_of_the_reserved_candidates_reduces_the_measure_of_a_split():
    # the candidates are 100, 200 and 310; M is (100 - 8)^2 = 8464 if none is reserved, 100^2 = 10000 with {100},
    # and 110^2 - lambda2 * 2500 with {100, 200}
    values = [*map(float, range(9)), 100.0, 200.0, 310.0]
    assert reserved(values) == 100.0  # 12100 - 2500 = 9600
    assert reserved(values, OutlierRule(lambda1=1.5, lambda2=0.5)) == 200.0  # 12100 - 1250 = 10850


def test_huawei_rule_uses_other_quantiles_and_a_gap_that_is_not_squared():
    # Q1 = 2.2 and Q3 = 8 + 0.8 * 12 = 17.6 at the quantiles 0.2 and 0.8, T = 17.6 + 1.5 * 15.4 = 40.7: 60 is the only candidate
    assert reserved([*map(float, range(9)), 20.0, 21.0, 60.0], HUAWEI) == 21.0
    # M is 100 - 19 = 81 if no candidate is reserved, 100 with {100}, and 110 - 2500 with {100, 200}
    assert reserved([*map(float, range(20)), 100.0, 200.0, 310.0], HUAWEI) == 100.0
    # M is 81, 140 - 100 = 40 and 160 - 400 with gaps as they are, and 81^2 = 6561, 1600 and 160^2 - 400 = 25200 with squared gaps
    values = [*map(float, range(20)), 100.0, 140.0, 300.0]
    assert reserved(values, HUAWEI) == 19.0
    assert reserved(values, PAPER) == 140.0


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
def test_values_without_outliers(values):
    assert reserved(values) is None


def test_truncated_outliers_of_a_weight_keep_their_sign():
    w = torch.tensor([[1.0, -2.0, 3.0, -4.0], [2.0, -3.0, 1.0, -100.0]], dtype=torch.bfloat16)
    expected = w.clone()
    expected[1, 3] = -4.0
    assert torch.equal(truncated(w, PAPER), expected)
    assert w[1, 3] == -100
    plain = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    assert truncated(plain, PAPER) is plain


def test_scales_of_outlier_channels_are_powers_of_their_ratio_to_the_largest_reserved():
    high = torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 2.0])
    low = torch.tensor([-1.0, -1.0, -1.0, -1.0, -64.0, -1.0])
    assert channel_scales(low, high, PAPER).tolist() == [1, 1, 1, 1, 4, 1]  # sqrt(64 / 4)
    # the negative tail is 1, 1, 1, 1, 64, 1, so its largest reserved magnitude is 1
    scales = channel_scales(low, high, HUAWEI)
    assert scales.tolist() == pytest.approx([1, 1, 1, 1, 64**0.7, 1])


def test_channels_without_a_reserved_magnitude_above_zero_are_not_scaled():
    zero, high = torch.zeros(6), torch.tensor([1.0, 2.0, 3.0, 4.0, 64.0, 2.0])
    assert channel_scales(zero, high, HUAWEI)[4] == pytest.approx(16**0.7)
    assert channel_scales(zero, zero, HUAWEI).tolist() == [1.0] * 6
    one_channel = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0])  # the largest reserved magnitude is 0
    assert channel_scales(torch.zeros(5), one_channel, PAPER).tolist() == [1.0] * 5


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=60))
def test_the_split_of_the_candidates_maximizes_the_measure_of_the_formula(values):
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


def test_power_of_two_rounds_in_the_logarithm():
    assert power_of_two(torch.tensor([1.0, 1.4, 1.5, 3.0, 20.0])).tolist() == [1, 1, 2, 4, 16]
