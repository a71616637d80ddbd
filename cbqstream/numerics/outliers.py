"""Coarse-to-fine preprocessing (CFP): detection and treatment of outliers (CBQ, arXiv 2312.07950, sec. 3.2).

Coarse step: Q1 and Q3 are the quartiles of a set of magnitudes. The candidates are the magnitudes above T = Q3 + lambda1 (Q3 - Q1).

Fine step: the sorted candidates are split into reserved values and outliers. The split maximizes

    M = (min(outliers) - max(reserved))^2 - lambda2 Var(reserved candidates),

so that the gap is large compared with the spread of the reserved candidates. At least one candidate is an outlier. If all of them are,
the reserved values are the magnitudes that are not above T, and the variance is 0.

Weights: outliers are truncated to the largest reserved magnitude. Activations: an outlier channel is divided by

    s_c = (max |x_c| / max(reserved))^exponent,

and the weights that read the channel are multiplied by s_c. The variant of Huawei's msmodelslim uses other quantiles, a gap that is not
squared and another exponent, and treats the positive and the negative tail separately.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cbqstream.config import TransformConfig

_SAMPLE = 1 << 20


@dataclass(frozen=True, slots=True)
class OutlierRule:
    """Parameters of a variant of CFP."""

    lambda1: float
    """Number of interquartile ranges above Q3 where candidates begin."""
    lambda2: float
    """Weight of the variance of the reserved candidates."""
    quantile: float = 0.25
    """Q1 is the quantile of this number, and Q3 the quantile of 1 minus this number."""
    gap_power: int = 2
    """Power of the gap between reserved values and outliers."""
    exponent: float = 0.5
    """Exponent of the scale of an outlier channel."""
    signed_tails: bool = False
    """Whether positive and negative activations are treated separately."""

    @classmethod
    def of(cls, config: TransformConfig) -> "OutlierRule":
        """The rule that the settings select."""
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
    """The largest magnitude that is not an outlier, or None if there are no outliers.

    Quantiles are interpolated linearly. For more than 2^20 magnitudes, they are the quantiles of an evenly spaced sample. Candidates are
    split on the CPU, because sums of prefixes of floating-point numbers have no deterministic order on CUDA, and torch refuses them there.

    Args:
        magnitudes: any shape, not negative.
        rule: parameters of the variant.
    """
    flat = magnitudes.flatten().float()
    sample = flat[:: -(-flat.numel() // _SAMPLE)]
    q1, q3 = torch.quantile(sample, torch.tensor([rule.quantile, 1 - rule.quantile], device=flat.device)).tolist()
    threshold = q3 + rule.lambda1 * (q3 - q1)
    candidates = flat[flat > threshold].cpu().sort().values.double()
    if not len(candidates):
        return None
    # magnitudes are not negative, so 0 is also the right floor if all of them are candidates
    floor = flat.masked_fill(flat > threshold, 0).max().cpu().double().view(1)
    reserved_max = torch.cat([floor, candidates[:-1]])
    gaps = (candidates - reserved_max) ** rule.gap_power
    split = int((gaps - rule.lambda2 * _variances_of_prefixes(candidates)).argmax())
    return float(reserved_max[split])


def _variances_of_prefixes(values: Tensor) -> Tensor:
    """Population variances of the first 0, 1, 2, ... n - 1 of n values; the variance of no value and of one value is 0."""
    centered = values - values.mean()  # avoids cancellation in the difference of squares
    counts = torch.arange(1, len(values), device=values.device, dtype=values.dtype)
    means = centered[:-1].cumsum(0) / counts
    variances = (centered[:-1].square().cumsum(0) / counts - means.square()).clamp(min=0)
    return torch.cat([values.new_zeros(1), variances])


def truncated(w_OI: Tensor, rule: OutlierRule) -> Tensor:
    """The weight with outliers truncated to the largest reserved magnitude, signs kept; the argument itself if it has no outliers."""
    limit = largest_reserved(w_OI.abs(), rule)
    return w_OI if limit is None else w_OI.clamp(-limit, limit)


def channel_scales(low_C: Tensor, high_C: Tensor, rule: OutlierRule) -> Tensor:
    """Scales s of channels, float32 [C]; 1 for channels that are not outliers.

    Args:
        low_C: smallest activation of each channel.
        high_C: largest activation of each channel.
        rule: parameters of the variant.
    """
    positive_C, negative_C = high_C.clamp(min=0), (-low_C).clamp(min=0)
    tails = [positive_C, negative_C] if rule.signed_tails else [torch.maximum(positive_C, negative_C)]
    return torch.stack([_tail_scales(tail_C.float(), rule) for tail_C in tails]).amax(0)


def _tail_scales(magnitude_C: Tensor, rule: OutlierRule) -> Tensor:
    limit = largest_reserved(magnitude_C, rule)
    if not limit:  # no outliers, or all other channels are zero, so there is no magnitude to scale to
        return torch.ones_like(magnitude_C)
    return (magnitude_C / limit).clamp(min=1) ** rule.exponent


def power_of_two(scale: Tensor) -> Tensor:
    """Nearest power of two of each scale; distances are measured between logarithms.

    Multiplication by a power of two is exact in every float format, so smoothing with it does not change the output of a block.
    """
    return torch.exp2(scale.log2().round())
