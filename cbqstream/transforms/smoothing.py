"""Rescaling the outlier channels inside a block, so that it computes the same and is easier to quantize.

Scales are powers of two: what is divided and multiplied by them keeps every digit in every float format, so the block's output is the
same to the last bit, weights stay in the dtype they are stored in, and exported norms need no other one.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cbqstream.config import OutlierConfig, Scheme
from cbqstream.models.families import Fold
from cbqstream.numerics.activation_quant import quantize_per_token
from cbqstream.numerics.affine import SMALLEST_SCALE, grouped, nearest_levels, num_groups
from cbqstream.numerics.input_statistics import InputStatistics
from cbqstream.numerics.outliers import OutlierRule, channel_scales, power_of_two
from cbqstream.numerics.scale_search import minmax_grid

_EXPONENTS = (0.25, 0.5, 0.75, 1.0)
_SMALLEST = 1e-6
_MOST_DOUBLINGS = 8
_FEWEST_SAMPLED = 128  # tokens: from 16 the search takes scales that do harm, from 64 it takes none that do much (W4A4)


def fold_scale(
    block: nn.Module, fold: Fold, statistics: InputStatistics, schemes: Mapping[str, Scheme], config: OutlierConfig
) -> Tensor:
    """Scale of every channel that the writer of a fold has, float32 [C], from the inputs of its readers.

    Where several heads read one (grouped-query attention), the largest of their scales is taken. A linear writer is divided no further
    than to the smallest step size that is stored.

    Args:
        block: of which the writer and the readers are in memory.
        fold: the place.
        statistics: of the readers' inputs.
        schemes: of the block's quantized layers, by name.
        config: which rule. Where fewer than 128 tokens were sampled, `search` leaves the channels as they are.
    """
    most_C = _most_divided(block, fold, schemes)
    if config.variant == "search":
        readers = [schemes[name] for name in fold.readers]
        return _searched_scale(block, fold, statistics, readers, most_C)
    scale_I = channel_scales(statistics.low, statistics.high, OutlierRule.of(config))
    return torch.minimum(_of_writer(block, fold, power_of_two(scale_I)), most_C)


def _most_divided(block: nn.Module, fold: Fold, schemes: Mapping[str, Scheme]) -> Tensor:
    """The largest scales, powers of two of at least 1, with which the step sizes of a linear writer can be stored, those too that are
    half of what reaches the largest weight of their group; float32 [C]."""
    w = parameters_of(block.get_submodule(fold.writer))["weight"]
    scheme = schemes.get(fold.writer)
    if scheme is None:
        return torch.full(w.shape[:1], torch.inf, device=w.device)
    largest_CG = grouped(w, num_groups(w.shape[1], scheme.group_size)).abs().amax(-1).float()
    least_C = largest_CG.where(largest_CG > 0, torch.inf).amin(1)
    half_C = least_C / (scheme.qmax - scheme.qmin)
    return torch.exp2((half_C / SMALLEST_SCALE).log2().floor()).clamp(min=1)


@torch.no_grad()
def _searched_scale(
    block: nn.Module, fold: Fold, statistics: InputStatistics, schemes: Sequence[Scheme], most_C: Tensor
) -> Tensor:
    """Of the scales m_c^e, with m_c the size of channel c, those with the smallest error of the readers' outputs on the sampled tokens.

    SmoothQuant (Xiao et al. 2023) and AWQ (Lin et al. 2023) search so; here m is the root mean square of the channel relative to the
    token's largest, or its largest magnitude.
    """
    x_TI = statistics.sample
    if len(x_TI) < _FEWEST_SAMPLED:
        return torch.ones_like(most_C)
    share_I = (x_TI / x_TI.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)).square().mean(0).sqrt()
    largest_I = torch.maximum(statistics.high.abs(), statistics.low.abs())
    weights = [parameters_of(block.get_submodule(name))["weight"].float() for name in fold.readers]
    outputs = [x_TI @ w_OI.T for w_OI in weights]
    share_I = share_I.where(share_I > 0, share_I.mean())  # that no sampled token reached says little
    best_C = torch.ones_like(most_C)
    least = _output_error(x_TI, weights, outputs, schemes)
    for size_I in (share_I, largest_I):
        for exponent in _EXPONENTS:
            logs_C = _of_writer(block, fold, size_I.clamp(min=_SMALLEST)).log2() * exponent
            scale_C = power_of_two(torch.exp2((logs_C - logs_C.mean()).clamp(-_MOST_DOUBLINGS, _MOST_DOUBLINGS)))
            scale_C = torch.minimum(scale_C, most_C)
            scale_I = reader_scale(block, fold, scale_C)
            error = _output_error(x_TI / scale_I, [w_OI * scale_I for w_OI in weights], outputs, schemes)
            if error < least:
                best_C, least = scale_C, error
    return best_C


def _output_error(x_TI: Tensor, weights: list[Tensor], outputs: list[Tensor], schemes: Sequence[Scheme]) -> float:
    """Power of the error of quantized products in that of the outputs, summed over readers."""
    bits = schemes[0].activation_bits  # the same in all of them
    if bits is not None:
        x_TI = quantize_per_token(x_TI, bits)
    total = 0.0
    for w_OI, y_TO, scheme in zip(weights, outputs, schemes, strict=True):
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
