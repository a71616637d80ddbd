"""Rescaling the outlier channels inside a block, so that it computes the same and is easier to quantize.

Scales are powers of two: what is divided and multiplied by them keeps every digit in every float format, so the block's output is the
same to the last bit, weights stay in the dtype they are stored in, and exported norms need no other one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cbqstream.models.families import Fold
from cbqstream.numerics.outliers import OutlierRule, channel_scales, power_of_two
from cbqstream.windows.quantized_linear import InputStatistics, QuantizedLinear

Module = nn.Module | QuantizedLinear


def fold_scale(block: nn.Module, fold: Fold, statistics: InputStatistics, rule: OutlierRule) -> Tensor:
    """Scale of every channel that the writer of a fold has, float32 [C], from the inputs of its readers.

    Where several heads read one (grouped-query attention), the largest of their scales is taken.
    """
    scale_I = power_of_two(channel_scales(statistics.low, statistics.high, rule))
    repeats, head_dim = _sharing(block, fold)
    return scale_I.view(-1, repeats, head_dim).amax(1).flatten()


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
