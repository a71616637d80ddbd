"""Coarse-to-fine preprocessing (CFP): which magnitudes are outliers, and what is done about them (CBQ, arXiv 2312.07950, sec. 3.2).

Coarse: with the quartiles Q1 and Q3 of a set of magnitudes, candidates are those above T = Q3 + lambda1 (Q3 - Q1).
Fine: the candidates, sorted, are split where the gap between outliers and reserved ones is large for the spread of the reserved,

    M = (min(outliers) - max(reserved))^2 - lambda2 Var(reserved candidates),

is largest. All of them may be outliers (reserved is then what lies below T, and no candidate's variance counts); none may not.

Weights: outliers are truncated to the largest reserved magnitude. Activations: an outlier channel is divided by

    s_c = (max |x_c| / max(reserved))^exponent,

and the weights that read it are multiplied by it. The variant of Huawei's msmodelslim has other quantiles, a gap that is not squared,
another exponent, and looks at the positive and the negative tail each on its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cbqstream.config import TransformConfig

_SAMPLE = 1 << 20


@dataclass(frozen=True, slots=True)
class OutlierRule:
    """The numbers of a variant."""

    lambda1: float
    lambda2: float
    quantile: float = 0.25
    """Q1 is this quantile, Q3 that of one minus it."""
    gap_power: int = 2
    exponent: float = 0.5
    signed_tails: bool = False

    @classmethod
    def of(cls, config: TransformConfig) -> "OutlierRule":
        """The rule that the settings ask for."""
        if config.smoothing_rule == "huawei":
            return cls(
                config.outlier_lambda1,
                config.outlier_lambda2,
                quantile=0.2,
                gap_power=1,
                exponent=0.7,
                signed_tails=True,
            )
        return cls(config.outlier_lambda1, config.outlier_lambda2)


def largest_reserved(magnitudes: Tensor, rule: OutlierRule) -> float | None:
    """The largest magnitude that is not an outlier, or None where nothing is.

    Args:
        magnitudes: any shape, not negative. Quantiles are linearly interpolated; of more than 2^20 values, those of an even sample.
        rule: the numbers.
    """
    flat = magnitudes.flatten().float()
    sample = flat[:: -(-flat.numel() // _SAMPLE)]
    q1, q3 = torch.quantile(sample, torch.tensor([rule.quantile, 1 - rule.quantile], device=flat.device)).tolist()
    threshold = q3 + rule.lambda1 * (q3 - q1)
    candidates = flat[flat > threshold].sort().values.double()
    if not len(candidates):
        return None
    # magnitudes are not negative: 0 is also what there is to keep where all are candidates
    floor = flat.masked_fill(flat > threshold, 0).max().double().view(1)
    reserved_max = torch.cat([floor, candidates[:-1]])
    gaps = (candidates - reserved_max) ** rule.gap_power
    split = int((gaps - rule.lambda2 * _variances_of_prefixes(candidates)).argmax())
    return float(reserved_max[split])


def _variances_of_prefixes(values: Tensor) -> Tensor:
    """Population variance of the first 0, 1, 2, ... n - 1 of n values (0 for none and for one)."""
    centred = values - values.mean()  # so that the difference of squares keeps its digits
    counts = torch.arange(1, len(values), device=values.device, dtype=values.dtype)
    means = centred[:-1].cumsum(0) / counts
    variances = (centred[:-1].square().cumsum(0) / counts - means.square()).clamp(min=0)
    return torch.cat([values.new_zeros(1), variances])


def truncated(w_OI: Tensor, rule: OutlierRule) -> Tensor:
    """The weight with its outliers brought to the largest reserved magnitude, sign kept; the argument itself if it has none."""
    limit = largest_reserved(w_OI.abs(), rule)
    return w_OI if limit is None else w_OI.clamp(-limit, limit)


def channel_scales(low_C: Tensor, high_C: Tensor, rule: OutlierRule) -> Tensor:
    """s, float32 [C], 1 for channels that are no outliers, from the smallest and largest activation of each channel."""
    positive_C, negative_C = high_C.clamp(min=0), (-low_C).clamp(min=0)
    tails = [positive_C, negative_C] if rule.signed_tails else [torch.maximum(positive_C, negative_C)]
    return torch.stack([_tail_scales(tail_C.float(), rule) for tail_C in tails]).amax(0)


def _tail_scales(magnitude_C: Tensor, rule: OutlierRule) -> Tensor:
    limit = largest_reserved(magnitude_C, rule)
    if not limit:  # no outliers, or nothing but outliers and zeros: no scale to bring them to
        return torch.ones_like(magnitude_C)
    return (magnitude_C / limit).clamp(min=1) ** rule.exponent


def power_of_two(scale: Tensor) -> Tensor:
    """The nearest power of two, in the logarithm. Multiplying by it is exact in every float format, so a fold changes no output."""
    return torch.exp2(scale.log2().round())
