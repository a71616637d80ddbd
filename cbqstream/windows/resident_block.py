"""A block of the current window in memory, with its quantized layers.

A block enters a window either for the first time (`watch_inputs`, then `start`) or with the state that the window before left (`resume`).
A block that leaves the window is hardened; a block that stays gives its state to the next window.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cbqstream.activations.store import ActivationStore, StoredValue
from cbqstream.config import ReconstructionConfig, TransformConfig
from cbqstream.errors import InputError
from cbqstream.models.block import NOTHING, BlockArguments, advance
from cbqstream.models.experts import Experts
from cbqstream.models.families import EXPERT, SmoothingPair
from cbqstream.numerics.affine import sqnr_db, vanished_rows
from cbqstream.numerics.input_statistics import InputStatistics, sum_of
from cbqstream.numerics.scale_search import minmax_grid
from cbqstream.records import QuantizedWeight
from cbqstream.rounding import search_kernels
from cbqstream.rounding.nearest import Nearest
from cbqstream.rounding.registry import method_of
from cbqstream.rounding.rounding import RoundingStart
from cbqstream.runtime.offload import OffloadedTensor
from cbqstream.runtime.scratch import Scratch
from cbqstream.scheme import Scheme
from cbqstream.transforms.registry import active
from cbqstream.transforms.transform import BlockParts, Transform
from cbqstream.windows.input_step import InputStep
from cbqstream.windows.quantized_linear import Phase, QuantizedLinear
from cbqstream.windows.routed_experts import RoutedExperts

SAMPLED_TOKENS = 1024
"""Number of tokens in a sample of the inputs of a layer."""
_SAMPLED_OF_EXPERT, _DENSER = 256, 16  # a router sends an expert one token in 8 to 32
FEWEST_TOKENS = 32
"""Number of tokens below which an expert is undersampled."""
_INPUT, _UNDERSAMPLED = "input.", "undersampled"


@dataclass(frozen=True, slots=True)
class BlockSettings:
    """Settings with which a block is quantized."""

    scheme: Scheme
    """Default scheme of the layers, for decisions that concern several layers."""
    reconstruction: ReconstructionConfig
    transforms: TransformConfig
    scratch: Scratch = field(default_factory=Scratch)

    def active_transforms(self) -> tuple[Transform, ...]:
        """Transforms that the settings select, in the order in which they are applied."""
        return tuple(transform(self.transforms) for transform in active(self.transforms, self.scheme))


class ResidentBlock:
    """A block in memory. It is mutable: its layers get roundings, are trained and are hardened.

    Args:
        index: number of the block in the model.
        module: the block; its quantized layers are `QuantizedLinear`.
        arguments: keyword arguments with which the model calls the block.
        layers: the quantized layers, by their name in the block.
        pairs: smoothing pairs of the block.
        experts: the routed experts of the block, if they are not in memory; their layers are not in `layers`.
        label: name of the block in messages; its number by default.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        arguments: BlockArguments,
        layers: Mapping[str, QuantizedLinear] | None = None,
        pairs: tuple[SmoothingPair, ...] = (),
        experts: RoutedExperts | None = None,
        label: str | None = None,
    ) -> None:
        self.experts = experts
        self.label = label or f"block {index}"
        """Name of the block in messages."""
        self.index = index
        self.module = module
        self.arguments = arguments
        self.layers = layers or {}
        self.parts = BlockParts(
            module, {name: layer.scheme for name, layer in self.layers.items()}, pairs, self._placed
        )
        self.found: dict[str, dict[str, Tensor]] = {}
        """Results of the transforms, by the name of the transform."""
        self.tokens: dict[str, int] = {}
        """Number of tokens from which the statistics of each layer were gathered."""
        self.sqnr_db: dict[str, float] = {}
        """Signal to quantization noise of the hard weights in decibels, by layer."""
        self.vanished: dict[str, int] = {}
        """Number of rows of the hard weights that are zero although the original rows are not, by layer; without layers that have none."""
        self.undersampled: set[str] = set()
        """Layers of experts that saw too few tokens to learn from; they are rounded to nearest."""
        self._transforms: tuple[Transform, ...] = ()

    def watch_inputs(self, num_tokens: int, settings: BlockSettings, *, all_experts: bool = False) -> None:
        """Gather the statistics that `start` needs from the next `num_tokens` tokens.

        If a transform needs a sample of the inputs of a layer, about 1,024 tokens are kept; for a layer of an expert, the first 256 tokens
        of a denser sample.

        Args:
            num_tokens: number of tokens that will pass the block.
            settings: settings of the run.
            all_experts: send every token to every expert.
        """
        self._send_all_tokens(all_experts)
        stride = max(1, num_tokens // SAMPLED_TOKENS)
        sampled = {name for each in settings.active_transforms() for name in each.sampled_layers(self.parts)}
        for name, layer in self.layers.items():
            if name not in sampled:
                layer.watch_inputs(None)
            elif EXPERT.search(name) and not all_experts:
                layer.watch_inputs(max(1, stride // _DENSER), _SAMPLED_OF_EXPERT)
            else:
                layer.watch_inputs(stride)

    def _send_all_tokens(self, send: bool) -> None:  # noqa: FBT001
        for module in self.module.modules():
            if isinstance(module, Experts):
                module.see_all = send

    def start(self, settings: BlockSettings, generator: torch.Generator) -> None:
        """Find the transforms, and give every layer its grid and rounding, from the weights and the statistics of the inputs.

        Args:
            settings: settings of the run.
            generator: for random starting values of roundings.

        Raises:
            InputError: a layer never ran.
        """
        self._send_all_tokens(False)  # noqa: FBT003
        statistics = self._take_statistics()
        self._transforms = settings.active_transforms()
        for transform in self._transforms:
            self.found[transform.name] = transform.find(self.parts, statistics)
        for name, layer in self.layers.items():
            layer.start_input_step(statistics[name])
            with layer.placed():
                weight, second_moment = self._weight_to_round(layer), statistics[name].second_moment
                if settings.reconstruction.init == "search":
                    kernels = search_kernels.KERNELS.chosen(settings.reconstruction.kernels, weight.device)
                    grid = kernels.search_grid(weight, second_moment, layer.scheme)
                else:
                    grid = minmax_grid(weight, layer.scheme)
                self._give_rounding(name, weight, grid, settings, generator)

    def _take_statistics(self) -> dict[str, InputStatistics]:
        """Statistics of the inputs of each layer; a layer of an undersampled expert gets the combined statistics of all experts.

        Raises:
            InputError: a layer never ran.
        """
        seen = {name: layer.take_statistics() for name, layer in self.layers.items()}
        enough = min(FEWEST_TOKENS, max((found.tokens for found in seen.values()), default=0))
        self.tokens.update({name: found.tokens for name, found in seen.items()})
        self.undersampled.update(name for name, found in seen.items() if found.tokens < enough and EXPERT.search(name))
        pooled: dict[str, InputStatistics] = {}
        for name in self.undersampled:
            alike = EXPERT.sub(".*.", name)
            if alike not in pooled:
                whole = sum_of([found for other, found in seen.items() if EXPERT.sub(".*.", other) == alike])
                stride = max(1, len(whole.sample) // SAMPLED_TOKENS)
                pooled[alike] = replace(whole, sample=whole.sample[::stride].clone())
            seen[name] = pooled[alike]
        for name, found in seen.items():
            if not found.tokens:
                raise InputError(self.label, f"{name} is never called as a layer. Use --ignore {name}.")
        return seen

    def _give_rounding(
        self,
        name: str,
        weight: Tensor,
        grid: tuple[Tensor, Tensor | None],
        settings: BlockSettings,
        generator: torch.Generator,
    ) -> None:
        """Give a layer the rounding of the settings, or `Nearest` if it is undersampled. The weight of the layer is in memory."""
        layer = self.layers[name]
        method = method_of(settings.reconstruction)
        method = Nearest if method.learns and name in self.undersampled else method
        start = RoundingStart(weight, *grid, layer.scheme, settings.reconstruction, generator, settings.scratch)
        rounding = method(start).requires_grad_(requires_grad=name not in self.undersampled)
        layer.rounding = rounding
        rounding.offload_beside(layer)

    def resume(self, settings: BlockSettings, generator: torch.Generator, state: Mapping[str, Tensor]) -> None:
        """Resume from the state that `window_state` gave in the window before.

        Args:
            settings: settings of the run.
            generator: for random starting values of roundings, which the state then replaces.
            state: values by name, as `window_state` gave them.
        """
        self._transforms = settings.active_transforms()
        for transform in self._transforms:
            self.found[transform.name] = _under(f"{transform.name}.", state)
            transform.apply(self.parts, self.found[transform.name])
        for name, layer in self.layers.items():
            own = _under(f"{name}.", state)
            if _UNDERSAMPLED in own:
                self.undersampled.add(name)
            if f"{_INPUT}scale0" in own:
                layer.input_step = InputStep(own[f"{_INPUT}scale0"], settings.scheme.activation_bits or 0)
            with layer.placed():
                grid = own["scale0"], own.get("zero_point")
                self._give_rounding(name, self._weight_to_round(layer), grid, settings, generator)
            _load_layer(layer, own)

    def state(self) -> dict[str, Tensor]:
        """Copies of the state of every rounding, input step and transform, by name, without the tensors of the size of a weight."""
        state: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            for prefix, part in (("", layer.rounding), (_INPUT, layer.input_step)):
                if part is not None:
                    state |= {f"{name}.{prefix}{key}": value for key, value in part.state().items()}
        state |= {f"{name}.{_UNDERSAMPLED}": torch.ones(1, dtype=torch.uint8) for name in sorted(self.undersampled)}
        return state | {
            f"{transform}.{key}": value for transform, found in self.found.items() for key, value in found.items()
        }

    def window_state(self) -> dict[str, Tensor | OffloadedTensor]:
        """Everything that the next window needs, by name."""
        large: dict[str, Tensor | OffloadedTensor] = {}
        for name, layer in self.layers.items():
            if layer.rounding is not None:
                large |= {f"{name}.{key}": value for key, value in layer.rounding.large_state().items()}
        return self.state() | large

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore every rounding and input step from `state` or `window_state`; transforms stay applied."""
        for name, layer in self.layers.items():
            _load_layer(layer, _under(f"{name}.", state))

    def harden(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """Name and final quantized weight of each layer. After a weight is yielded, its layer computes with it."""
        for name, layer in self.layers.items():
            if layer.rounding is not None:
                step = None if layer.input_step is None else layer.input_step.stored()
                hard = replace(layer.rounding.harden(), input_scale=step)
                with layer.placed():
                    self.sqnr_db[name] = sqnr_db(layer.weight, hard)
                    vanished = vanished_rows(layer.weight, hard)
                if vanished:
                    self.vanished[name] = vanished
                layer.freeze(hard)
                yield name, hard

    def stored(self, name: str, value: Tensor) -> Tensor:
        """Stored value of a tensor outside the quantized layers, after the transforms.

        Args:
            name: name of the tensor in the block.
            value: value of the tensor in the source; the result has its dtype.
        """
        for transform in self._transforms:
            change = transform.stored(self.parts, self.found[transform.name]).get(name)
            value = value if change is None else change(value)
        return value

    def _weight_to_round(self, layer: QuantizedLinear) -> Tensor:
        weight = layer.weight
        for transform in self._transforms:
            weight = transform.weight_to_round(weight)
        return weight

    @contextmanager
    def _placed(self, names: Collection[str]) -> Iterator[None]:
        """Keep the weights of layers in memory inside a `with`; names that are not those of quantized layers are ignored."""
        with ExitStack() as stack:
            for name in set(names) & self.layers.keys():
                stack.enter_context(self.layers[name].placed())
            yield


def _load_layer(layer: QuantizedLinear, state: Mapping[str, Tensor]) -> None:
    """Restore the rounding and the input step of a layer from its part of the state of a block."""
    if layer.input_step is not None:
        layer.input_step.load(_under(_INPUT, state))
    if layer.rounding is not None:
        own = {name: value for name, value in state.items() if name != _UNDERSAMPLED and not name.startswith(_INPUT)}
        layer.rounding.load(own)


def _under(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values whose name begins with `prefix`, by the rest of the name. Other values are not read."""
    return {name.removeprefix(prefix): values[name] for name in values if name.startswith(prefix)}


def all_layers(blocks: Sequence[ResidentBlock]) -> Iterator[QuantizedLinear]:
    """Quantized layers of all blocks, in order."""
    for block in blocks:
        yield from block.layers.values()


def values_beside(blocks: Sequence[ResidentBlock], stream: ActivationStore) -> dict[str, StoredValue]:
    """Values beside a stream that blocks read or hand on, by key."""
    keys = dict.fromkeys(value.key for block in blocks for value in block.arguments.of_tokens.values())
    keys |= {block.experts.key: None for block in blocks if block.experts is not None}
    return {key: stream.beside[key] for key in keys} | stream.handed


def values_without_sums(block: ResidentBlock, stream: ActivationStore) -> dict[str, StoredValue]:
    """Values beside a stream that a block reads or hands on, by key, without the sums of its experts."""
    return {value.key: stream.beside[value.key] for value in block.arguments.of_tokens.values()} | stream.handed


def as_batch(values: Mapping[str, StoredValue], read: Sequence[Tensor]) -> dict[str, Tensor]:
    """Values of a batch, [B, ...] by key, from the matrices [B, rows, columns] that were read from their stores."""
    return {key: x.view(len(x), *value.shape) for (key, value), x in zip(values.items(), read, strict=True)}


def run_blocks(
    blocks: Sequence[ResidentBlock],
    x_BSD: Tensor,
    phase: Phase,
    beside: Mapping[str, Tensor] = NOTHING,
    *,
    activation_checkpointing: bool = False,
) -> Tensor:
    """Hidden states [B, S, D] after the blocks, computed with the weights of `phase`. See `advance_blocks`."""
    return advance_blocks(blocks, x_BSD, phase, beside, activation_checkpointing=activation_checkpointing)[0]


def advance_blocks(
    blocks: Sequence[ResidentBlock],
    x_BSD: Tensor,
    phase: Phase,
    beside: Mapping[str, Tensor] = NOTHING,
    *,
    activation_checkpointing: bool = False,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Hidden states [B, S, D] after the blocks, and the values beside them, computed with the weights of `phase`.

    With activation checkpointing, only the inputs of the blocks are kept for the backward pass, which runs each block again (Chen et al.
    2016, arXiv 1604.06174). The roundings of a block change only after its second run.

    Args:
        blocks: consecutive blocks.
        x_BSD: hidden states before the first block.
        phase: weights that the layers compute with.
        beside: values of the segments beside the hidden states, by key.
        activation_checkpointing: whether activations inside the blocks are computed again in the backward pass.
    """
    for layer in all_layers(blocks):
        layer.phase = phase
    for block in blocks:
        if activation_checkpointing:
            run = partial(_advance, block, beside=beside)
            x_BSD, beside = checkpoint(run, x_BSD, use_reentrant=False, preserve_rng_state=False)
        else:
            x_BSD, beside = _advance(block, x_BSD, beside)
    return x_BSD, beside


def _advance(block: ResidentBlock, x_BSD: Tensor, beside: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Hidden states after one block, and the values beside them. See `advance_blocks`."""
    if block.experts is not None:
        block.experts.give(beside[block.experts.key])
    return advance(block.module, x_BSD, block.arguments, beside=beside)
