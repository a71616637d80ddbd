"""Rescaling the outlier channels inside a block, so that it computes the same and is easier to quantize.

Scales are powers of two: what is divided and multiplied by them keeps every digit in every float format, so the block's output is the
same to the last bit, weights stay in the dtype they are stored in, and exported norms need no other one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cbqstream.config import OutlierConfig, Scheme
from cbqstream.models.families import Fold
from cbqstream.numerics.activation_quant import quantize_per_token
from cbqstream.numerics.affine import nearest_levels
from cbqstream.numerics.outliers import OutlierRule, channel_scales, power_of_two
from cbqstream.numerics.scale_search import minmax_grid
from cbqstream.windows.quantized_linear import InputStatistics

_EXPONENTS = (0.25, 0.5, 0.75, 1.0)
_SMALLEST = 1e-6
_MOST_DOUBLINGS = 8


def fold_scale(
    block: nn.Module, fold: Fold, statistics: InputStatistics, scheme: Scheme, config: OutlierConfig
) -> Tensor:
    """Scale of every channel that the writer of a fold has, float32 [C], from the inputs of its readers.

    Where several heads read one (grouped-query attention), the largest of their scales is taken.
    """
    if config.variant == "search":
        return _searched_scale(block, fold, statistics, scheme)
    rule = OutlierRule.of(config)
    return _of_writer(block, fold, power_of_two(channel_scales(statistics.low, statistics.high, rule)))


@torch.no_grad()
def _searched_scale(block: nn.Module, fold: Fold, statistics: InputStatistics, scheme: Scheme) -> Tensor:
    """Of the scales m_c^e, with m_c the size of channel c, those with the smallest error of the readers' outputs on the sampled tokens.

    SmoothQuant (Xiao et al. 2023) and AWQ (Lin et al. 2023) search so; here m is the root mean square of the channel relative to the
    token's largest, or its largest magnitude.
    """
    x_TI = statistics.sample
    share_I = (x_TI / x_TI.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)).square().mean(0).sqrt()
    largest_I = torch.maximum(statistics.high.abs(), statistics.low.abs())
    weights = [parameters_of(block.get_submodule(name))["weight"].float() for name in fold.readers]
    outputs = [x_TI @ w_OI.T for w_OI in weights]
    best_C = torch.ones_like(_of_writer(block, fold, share_I))
    least = _output_error(x_TI, weights, outputs, scheme)
    for size_I in (share_I, largest_I):
        for exponent in _EXPONENTS:
            logs_C = _of_writer(block, fold, size_I.clamp(min=_SMALLEST)).log2() * exponent
            scale_C = power_of_two(torch.exp2((logs_C - logs_C.mean()).clamp(-_MOST_DOUBLINGS, _MOST_DOUBLINGS)))
            scale_I = reader_scale(block, fold, scale_C)
            error = _output_error(x_TI / scale_I, [w_OI * scale_I for w_OI in weights], outputs, scheme)
            if error < least:
                best_C, least = scale_C, error
    return best_C


def _output_error(x_TI: Tensor, weights: list[Tensor], outputs: list[Tensor], scheme: Scheme) -> float:
    """Power of the error of quantized products in that of the outputs, summed over readers."""
    if scheme.activation_bits is not None:
        x_TI = quantize_per_token(x_TI, scheme.activation_bits)
    total = 0.0
    for w_OI, y_TO in zip(weights, outputs, strict=True):
        grid = minmax_grid(w_OI, scheme)
        levels = nearest_levels(w_OI, *grid, scheme)
        w_hat = levels.mul_(grid[0].unsqueeze(-1)).flatten(1)
        total += float((x_TI @ w_hat.T - y_TO).square().sum() / y_TO.square().sum().clamp(min=_SMALLEST))
    return total


@torch.no_grad()
def apply_fold(block: nn.Module, fold: Fold, scale_C: Tensor) -> None:
    """Divide what the writer writes by the scale, in place, and multiply what reads it by it."""
    writer = block.get_submodule(fold.writer)
    for parameter in parameters_of(writer).values():
        parameter.div_(_along_rows(scale_C, parameter).to(parameter.dtype))
    scale_I = reader_scale(block, fold, scale_C)
    for name in fold.readers:
        weight = parameters_of(block.get_submodule(name))["weight"]
        weight.mul_(scale_I.to(weight.dtype))


def reader_scale(block: nn.Module, fold: Fold, scale_C: Tensor) -> Tensor:
    """The scale of the writer's channels as its readers see them, [I]."""
    repeats, head_dim = _sharing(block, fold)
    return scale_C.view(-1, 1, head_dim).expand(-1, repeats, -1).flatten()


def _of_writer(block: nn.Module, fold: Fold, value_I: Tensor) -> Tensor:
    """The largest value [C] of those that read a channel."""
    repeats, head_dim = _sharing(block, fold)
    return value_I.view(-1, repeats, head_dim).amax(1).flatten()


def parameters_of(module: nn.Module) -> Mapping[str, Tensor]:
    """Weight and bias of a norm or a quantized layer, as far as it has them."""
    named = {"weight": getattr(module, "weight", None), "bias": getattr(module, "bias", None)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _sharing(block: nn.Module, fold: Fold) -> tuple[int, int]:
    """How many times each head of the writer is read, and the width of a head (all channels, where each is read once)."""
    written = parameters_of(block.get_submodule(fold.writer))["weight"].shape[0]
    read = parameters_of(block.get_submodule(fold.readers[0]))["weight"].shape[1]
    if read == written:
        return 1, written
    attention = block.get_submodule(fold.writer.rpartition(".")[0])
    return read // written, int(attention.head_dim)  # type: ignore[arg-type]


def _along_rows(scale_C: Tensor, parameter: Tensor) -> Tensor:
    return scale_C.view(-1, *(1 for _ in parameter.shape[1:]))
