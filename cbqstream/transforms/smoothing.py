"""Smoothing: rescaling the channels between two layers of a block, so that the block computes the same and is easier to quantize.

A smoothing pair is a norm or linear layer that is smoothed (its output channels are divided by a scale) and the linear layers that read
the channels and balance it (their input columns are multiplied by the scale). Scales are powers of two. Dividing and multiplying by them
keeps every digit in every float format, so the output of the block is the same to the last bit, weights stay in the dtype they are stored
in, and exported norms need no other dtype.
"""

from collections.abc import Callable, Mapping, Sequence, Set

import torch
from torch import Tensor, nn
from typing_extensions import override

from cbqstream.config import TransformConfig
from cbqstream.models.families import SmoothingPair
from cbqstream.numerics.activation_quant import quantize_per_token
from cbqstream.numerics.affine import SMALLEST_SCALE, grouped, nearest_levels, num_groups
from cbqstream.numerics.input_statistics import InputStatistics
from cbqstream.numerics.outliers import OutlierRule, channel_scales, power_of_two
from cbqstream.numerics.scale_search import minmax_grid
from cbqstream.scheme import Scheme
from cbqstream.transforms.transform import BlockParts, Transform, TransformCost

_EXPONENTS = (0.25, 0.5, 0.75, 1.0)
_SMALLEST = 1e-6
_MOST_DOUBLINGS = 8
_FEWEST_SAMPLED = 128  # tokens: from 16 the search takes scales that do harm, from 64 it takes none that do much (W4A4)
_SEARCH_BYTES = 28


class Smoothing(Transform):
    """Channel scales of every smoothing pair of a block; found for one pair after the other."""

    name = "smoothing"

    @classmethod
    @override
    def is_active(cls, config: TransformConfig, scheme: Scheme) -> bool:
        return config.smooths(scheme)

    @classmethod
    @override
    def cost(cls) -> TransformCost:
        return TransformCost(search_bytes=_SEARCH_BYTES)

    @override
    def sampled_layers(self, block: BlockParts) -> Set[str]:
        return {pair.balance_layers[0] for pair in block.pairs}

    @override
    def find(self, block: BlockParts, statistics: dict[str, InputStatistics]) -> dict[str, Tensor]:
        """Scales float32 [C] that are not all 1, by the name of the smoothed layer. See `Transform.find`."""
        found = {}
        for pair in block.pairs:
            with block.place((pair.smooth_layer, *pair.balance_layers)):
                seen = statistics[pair.balance_layers[0]]
                scale_C = smoothing_scale(block.module, pair, seen, block.schemes, self.config)
                if bool((scale_C != 1).any()):
                    smooth(block.module, pair, scale_C)
                    found[pair.smooth_layer] = scale_C
            scale_I = balance_scale(block.module, pair, scale_C)
            statistics |= {name: statistics[name].divided(scale_I) for name in pair.balance_layers}
        return found

    @override
    def apply(self, block: BlockParts, found: Mapping[str, Tensor]) -> None:
        for pair in block.pairs:
            if pair.smooth_layer in found:
                with block.place((pair.smooth_layer, *pair.balance_layers)):
                    smooth(block.module, pair, found[pair.smooth_layer])

    @override
    def stored(self, block: BlockParts, found: Mapping[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
        """Division of the norms and biases of smoothed layers. See `Transform.stored`."""
        scales = {
            f"{layer}.{name}": scale_C
            for layer, scale_C in found.items()
            for name in parameters_of(block.module.get_submodule(layer))
        }
        return {
            name: _divide_by(scale_C)
            for name, scale_C in scales.items()
            if name.removesuffix(".weight") not in block.schemes
        }


def _divide_by(scale_C: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value: (value.float() / scale_C.cpu()).to(value.dtype)


def smoothing_scale(
    block: nn.Module,
    pair: SmoothingPair,
    statistics: InputStatistics,
    schemes: Mapping[str, Scheme],
    config: TransformConfig,
) -> Tensor:
    """Scale of every output channel of the smoothed layer of a pair, float32 [C].

    Where several heads read one channel (grouped-query attention), the largest of their scales is taken. A linear layer is divided at most
    so far that its own step sizes can still be stored.

    Args:
        block: with the layers of the pair in memory.
        pair: the smoothing pair.
        statistics: of the inputs of the balance layers.
        schemes: of the block's quantized layers, by name.
        config: which rule. With fewer than 128 sampled tokens, the rule `search` leaves the channels as they are.
    """
    most_C = _most_divided(block, pair, schemes)
    if config.smoothing_rule == "search":
        readers = [schemes[name] for name in pair.balance_layers]
        return _searched_scale(block, pair, statistics, readers, most_C)
    scale_I = channel_scales(statistics.low, statistics.high, OutlierRule.of(config))
    return torch.minimum(_per_smoothed_channel(block, pair, power_of_two(scale_I)), most_C)


def _most_divided(block: nn.Module, pair: SmoothingPair, schemes: Mapping[str, Scheme]) -> Tensor:
    """Largest scales, float32 [C], powers of two of at least 1, with which the step sizes of a smoothed linear layer can be stored.

    They are chosen so that half the step size that reaches the largest weight of a group can be stored too.
    """
    w = parameters_of(block.get_submodule(pair.smooth_layer))["weight"]
    scheme = schemes.get(pair.smooth_layer)
    if scheme is None:
        return torch.full(w.shape[:1], torch.inf, device=w.device)
    largest_CG = grouped(w, num_groups(w.shape[1], scheme.group_size)).abs().amax(-1).float()
    least_C = largest_CG.where(largest_CG > 0, torch.inf).amin(1)
    half_C = least_C / (scheme.qmax - scheme.qmin)
    return torch.exp2((half_C / SMALLEST_SCALE).log2().floor()).clamp(min=1)


@torch.no_grad()
def _searched_scale(
    block: nn.Module, pair: SmoothingPair, statistics: InputStatistics, schemes: Sequence[Scheme], most_C: Tensor
) -> Tensor:
    """Scales m_c^e, with m_c the size of channel c, that give the smallest error of the balance layers' outputs on the sample.

    SmoothQuant (Xiao et al. 2023) and AWQ (Lin et al. 2023) search in this way. Here m is either the root mean square of the channel
    relative to the token's largest channel, or the channel's largest magnitude.
    """
    x_TI = statistics.sample
    if len(x_TI) < _FEWEST_SAMPLED:
        return torch.ones_like(most_C)
    share_I = (x_TI / x_TI.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)).square().mean(0).sqrt()
    largest_I = torch.maximum(statistics.high.abs(), statistics.low.abs())
    weights = [parameters_of(block.get_submodule(name))["weight"].float() for name in pair.balance_layers]
    outputs = [x_TI @ w_OI.T for w_OI in weights]
    share_I = share_I.where(share_I > 0, share_I.mean())  # a channel that is zero in the sample has no size of its own
    best_C = torch.ones_like(most_C)
    least = _output_error(x_TI, weights, outputs, schemes)
    for size_I in (share_I, largest_I):
        for exponent in _EXPONENTS:
            logs_C = _per_smoothed_channel(block, pair, size_I.clamp(min=_SMALLEST)).log2() * exponent
            scale_C = power_of_two(torch.exp2((logs_C - logs_C.mean()).clamp(-_MOST_DOUBLINGS, _MOST_DOUBLINGS)))
            scale_C = torch.minimum(scale_C, most_C)
            scale_I = balance_scale(block, pair, scale_C)
            error = _output_error(x_TI / scale_I, [w_OI * scale_I for w_OI in weights], outputs, schemes)
            if error < least:
                best_C, least = scale_C, error
    return best_C


def _output_error(x_TI: Tensor, weights: list[Tensor], outputs: list[Tensor], schemes: Sequence[Scheme]) -> float:
    """Power of the error of quantized products relative to the power of the exact outputs, summed over layers."""
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
def smooth(block: nn.Module, pair: SmoothingPair, scale_C: Tensor) -> None:
    """Divide the output channels of the smoothed layer by the scale, and multiply the inputs of the balance layers by it; in place."""
    for parameter in parameters_of(block.get_submodule(pair.smooth_layer)).values():
        parameter.div_(_along_rows(scale_C, parameter).to(parameter.dtype))
    scale_I = balance_scale(block, pair, scale_C)
    for name in pair.balance_layers:
        weight = parameters_of(block.get_submodule(name))["weight"]
        weight.mul_(scale_I.to(weight.dtype))


def balance_scale(block: nn.Module, pair: SmoothingPair, scale_C: Tensor) -> Tensor:
    """Scale of the input columns of the balance layers, [I], from that of the smoothed channels [C]."""
    repeats, head_dim = _sharing(block, pair)
    return scale_C.view(-1, 1, head_dim).expand(-1, repeats, -1).flatten()


def _per_smoothed_channel(block: nn.Module, pair: SmoothingPair, value_I: Tensor) -> Tensor:
    """Largest value [C] over the input columns that read a channel."""
    repeats, head_dim = _sharing(block, pair)
    return value_I.view(-1, repeats, head_dim).amax(1).flatten()


def parameters_of(module: nn.Module) -> Mapping[str, Tensor]:
    """Weight and bias of a norm or a quantized layer, where it has them."""
    named = {"weight": getattr(module, "weight", None), "bias": getattr(module, "bias", None)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _sharing(block: nn.Module, pair: SmoothingPair) -> tuple[int, int]:
    """Number of heads that read each head of the smoothed layer, and width of a head (all channels, if each is read once)."""
    written = parameters_of(block.get_submodule(pair.smooth_layer))["weight"].shape[0]
    read = parameters_of(block.get_submodule(pair.balance_layers[0]))["weight"].shape[1]
    if read == written:
        return 1, written
    attention = block.get_submodule(pair.smooth_layer.rpartition(".")[0])
    return read // written, int(attention.head_dim)  # type: ignore[arg-type]


def _along_rows(scale_C: Tensor, parameter: Tensor) -> Tensor:
    return scale_C.view(-1, *(1 for _ in parameter.shape[1:]))
