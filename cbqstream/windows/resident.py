"""The blocks of a window on the device, with their quantized layers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cbqstream.config import OutlierConfig, ReconstructionConfig, Scheme
from cbqstream.disk import ScratchFile
from cbqstream.errors import InputError
from cbqstream.models.block import BlockArguments, build_block, run_block
from cbqstream.models.experts import Experts
from cbqstream.models.families import EXPERT, Fold
from cbqstream.models.meta_model import MetaModel
from cbqstream.numerics.affine import sqnr_db
from cbqstream.numerics.input_statistics import InputStatistics, sum_of
from cbqstream.numerics.outliers import OutlierRule, truncated
from cbqstream.numerics.scale_search import minmax_grid, search_grid
from cbqstream.records import Compute, QuantizedWeight, WeightSource
from cbqstream.rounding.rounding import Rounding, make_rounding
from cbqstream.runtime.offload import OffloadedTensor
from cbqstream.runtime.scratch import Scratch
from cbqstream.transforms.smoothing import apply_fold, fold_scale, parameters_of, reader_scale
from cbqstream.windows.quantized_linear import (
    InputStep,
    Phase,
    QuantizedLinear,
    replace_linears,
)

_SAMPLED_TOKENS = 1024
_SAMPLED_OF_EXPERT, _DENSER = 256, 16  # it sees one token in 8 to 32
_FEWEST_TOKENS = 32
_FOLD, _INPUT, _UNDERSAMPLED = "fold.", "input.", "undersampled"


@dataclass(frozen=True, slots=True)
class BlockSettings:
    """What a block needs to know to be quantized."""

    scheme: Scheme
    """Of most layers; for what concerns several of them."""
    reconstruction: ReconstructionConfig
    outliers: OutlierConfig
    scratch: Scratch = field(default_factory=Scratch)


@dataclass(frozen=True, slots=True)
class ResidentBlock:
    """A block that is in memory: how to run it, its layers by name, and the scales that were folded, by their writer."""

    index: int
    module: nn.Module
    arguments: BlockArguments
    layers: Mapping[str, QuantizedLinear]
    folds: tuple[Fold, ...]
    scales: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    """How many the inputs of each layer were watched for."""
    sqnr_db: dict[str, float] = field(default_factory=dict)
    """Signal to noise of the hard weights, decibels, by layer."""
    undersampled: set[str] = field(default_factory=set)
    """Layers of experts that saw too few of them to learn from; they are rounded to nearest."""

    def watch_inputs(self, num_tokens: int, settings: BlockSettings, *, all_experts: bool = False) -> None:
        """Gather the statistics that `start` needs from the next `num_tokens` tokens; to rescale channels, a sample of about 1024 too, of
        an expert the first 256 of a denser one.

        With `all_experts` experts see the tokens too that the router does not send to them.
        """
        self._show_experts(all_tokens=all_experts)
        stride = max(1, num_tokens // _SAMPLED_TOKENS)
        sampled = {fold.readers[0] for fold in self.folds} if settings.outliers.folds(settings.scheme) else ()
        for name, layer in self.layers.items():
            if name not in sampled:
                layer.watch_inputs(None)
            elif EXPERT.search(name) and not all_experts:
                layer.watch_inputs(max(1, stride // _DENSER), _SAMPLED_OF_EXPERT)
            else:
                layer.watch_inputs(stride)

    def _show_experts(self, *, all_tokens: bool) -> None:
        for module in self.module.modules():
            if isinstance(module, Experts):
                module.see_all = all_tokens

    def start(self, settings: BlockSettings, generator: torch.Generator) -> None:
        """From the weights and the inputs that were watched: fold the outlier channels, and give every layer its grid and rounding."""
        self._show_experts(all_tokens=False)
        statistics = self._take_statistics()
        if settings.outliers.folds(settings.scheme):
            schemes = {name: layer.scheme for name, layer in self.layers.items()}
            for fold in self.folds:
                seen = statistics[fold.readers[0]]
                with self._placed(fold):
                    scale_C = fold_scale(self.module, fold, seen, schemes, settings.outliers)
                    self._fold(fold, scale_C)
                scale_I = reader_scale(self.module, fold, scale_C)
                statistics |= {name: statistics[name].divided(scale_I) for name in fold.readers}
        for name, layer in self.layers.items():
            layer.start_input_step(statistics[name])
            self._start_layer(name, statistics[name], settings, generator)

    def _start_layer(
        self, name: str, statistics: InputStatistics, settings: BlockSettings, generator: torch.Generator
    ) -> None:
        layer = self.layers[name]
        with layer.placed():
            weight = self._rounded_weight(layer, settings)
            if settings.reconstruction.init == "search":
                grid = search_grid(weight, statistics.second_moment, layer.scheme)
            else:
                grid = minmax_grid(weight, layer.scheme)
            self._give_rounding(name, weight, grid, settings, generator)

    def _take_statistics(self) -> dict[str, InputStatistics]:
        """Of the inputs of each layer; an expert that saw too few tokens to say much has those of all experts of the block."""
        seen = {name: layer.take_statistics() for name, layer in self.layers.items()}
        enough = min(_FEWEST_TOKENS, max(found.tokens for found in seen.values()))
        self.tokens.update({name: found.tokens for name, found in seen.items()})
        self.undersampled.update(name for name, found in seen.items() if found.tokens < enough and EXPERT.search(name))
        pooled: dict[str, InputStatistics] = {}
        for name in self.undersampled:
            alike = EXPERT.sub(".*.", name)
            if alike not in pooled:
                whole = sum_of([found for other, found in seen.items() if EXPERT.sub(".*.", other) == alike])
                stride = max(1, len(whole.sample) // _SAMPLED_TOKENS)
                pooled[alike] = replace(whole, sample=whole.sample[::stride].clone())
            seen[name] = pooled[alike]
        for name, found in seen.items():
            if not found.tokens:
                raise InputError(
                    f"block {self.index}", f"{name} is never called as a layer. Leave it out: --ignore {name}."
                )
        return seen

    def _give_rounding(
        self,
        name: str,
        weight: Tensor,
        grid: tuple[Tensor, Tensor | None],
        settings: BlockSettings,
        generator: torch.Generator,
    ) -> None:
        """To a layer that is placed, as the settings ask for; to nearest where there is too little to learn from."""
        layer, scratch = self.layers[name], settings.scratch
        if name in self.undersampled:
            rounding = Rounding(weight, *grid, layer.scheme, scratch).requires_grad_(requires_grad=False)
        else:
            rounding = make_rounding(weight, *grid, layer.scheme, settings.reconstruction, generator, scratch)
        layer.rounding = rounding
        rounding.offload_beside(layer)

    def go_on(self, settings: BlockSettings, generator: torch.Generator, carried: Mapping[str, Tensor]) -> None:
        """From what `carry` gave in the window before."""
        for fold in self.folds:
            if f"{_FOLD}{fold.writer}" in carried:
                self._fold(fold, carried[f"{_FOLD}{fold.writer}"])
        for name, layer in self.layers.items():
            self._go_on_with(name, layer, settings, generator, _under(f"{name}.", carried))

    def _go_on_with(
        self,
        name: str,
        layer: QuantizedLinear,
        settings: BlockSettings,
        generator: torch.Generator,
        state: dict[str, Tensor],
    ) -> None:
        if state.pop(_UNDERSAMPLED, None) is not None:
            self.undersampled.add(name)
        step = _under(_INPUT, state)
        if step:
            layer.input_step = InputStep(step["scale0"], settings.scheme.activation_bits or 0)
            layer.input_step.load(step)
        state = {key: value for key, value in state.items() if not key.startswith(_INPUT)}
        grid = (state["scale0"], state.get("zero_point"))
        with layer.placed():
            self._give_rounding(name, self._rounded_weight(layer, settings), grid, settings, generator)
        if layer.rounding is not None:
            layer.rounding.load(state)

    def state(self) -> dict[str, Tensor]:
        """Of every rounding and step size of inputs, and the folded scales, by name, besides what `carry` adds. Copies."""
        state: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            for prefix, part in (("", layer.rounding), (_INPUT, layer.input_step)):
                if part is not None:
                    state |= {f"{name}.{prefix}{key}": value for key, value in part.state().items()}
        state |= {f"{name}.{_UNDERSAMPLED}": torch.ones(1, dtype=torch.uint8) for name in sorted(self.undersampled)}
        return state | {f"{_FOLD}{writer}": scale for writer, scale in self.scales.items()}

    def carry(self) -> dict[str, Tensor | OffloadedTensor]:
        """All that the next window needs to go on, by name."""
        large: dict[str, Tensor | OffloadedTensor] = {}
        for name, layer in self.layers.items():
            if layer.rounding is not None:
                large |= {f"{name}.{key}": value for key, value in layer.rounding.large_state().items()}
        return self.state() | large

    def load(self, carried: Mapping[str, Tensor]) -> None:
        """Take every rounding and step size of inputs back to what `carry` gave, or to the start that `state` gave; what was folded stays
        folded."""
        for name, layer in self.layers.items():
            state = _under(f"{name}.", carried)
            state.pop(_UNDERSAMPLED, None)
            if layer.input_step is not None:
                layer.input_step.load(_under(_INPUT, state))
            if layer.rounding is not None:
                layer.rounding.load({key: value for key, value in state.items() if not key.startswith(_INPUT)})

    def rescaled(self) -> dict[str, Tensor]:
        """What folding changed besides the weights of layers, norms and biases, by their name in the block: what they were divided by."""
        changed = {
            f"{writer}.{name}": scale_C
            for writer, scale_C in self.scales.items()
            for name in parameters_of(self.module.get_submodule(writer))
        }
        return {name: scale_C for name, scale_C in changed.items() if name.removesuffix(".weight") not in self.layers}

    def _fold(self, fold: Fold, scale_C: Tensor) -> None:
        if bool((scale_C != 1).any()):
            with self._placed(fold):
                apply_fold(self.module, fold, scale_C)
            self.scales[fold.writer] = scale_C

    @contextmanager
    def _placed(self, fold: Fold) -> Iterator[None]:
        """The layers of a fold are, for the length of a `with`."""
        with ExitStack() as stack:
            for name in {fold.writer, *fold.readers} & self.layers.keys():
                stack.enter_context(self.layers[name].placed())
            yield

    def _rounded_weight(self, layer: QuantizedLinear, settings: BlockSettings) -> Tensor:
        if not settings.outliers.weights:
            return layer.weight
        return truncated(layer.weight, OutlierRule.of(settings.outliers))

    def harden(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """The final quantized weights, layer by layer. The block computes with those that were given from now on."""
        for name, layer in self.layers.items():
            if layer.rounding is not None:
                step = None if layer.input_step is None else layer.input_step.stored()
                hard = replace(layer.rounding.harden(), input_scale=step)
                with layer.placed():
                    self.sqnr_db[name] = sqnr_db(layer.weight, hard)
                layer.freeze(hard)
                yield name, hard


def read_block(
    meta_model: MetaModel,
    index: int,
    source: WeightSource,
    schemes: Mapping[str, Scheme],
    arguments: BlockArguments,
    compute: Compute,
    scratch: Scratch,
    file: ScratchFile | None = None,
) -> ResidentBlock:
    """Block `index` with its original weights.

    Args:
        meta_model: the model it belongs to.
        index: which block.
        source: where its tensors come from.
        schemes: of the layers that are quantized, by their name in it.
        arguments: what the model hands to it.
        compute: where it goes, and in which dtype it computes.
        scratch: where weights lie for a moment.
        file: where the weights of these layers lie while they are not used; None is memory.
    """
    device, dtype = compute.device, compute.dtype
    without = () if file is None else schemes
    module = build_block(meta_model, index, source, device=device, dtype=dtype, linear_dtype=None, without=without)
    spec, layers = meta_model.blocks[index], replace_linears(module, schemes, scratch)
    if file is not None:
        for name, layer in layers.items():
            layer.weight = source.read(spec.tensors[f"{name}.weight"], device=device)
            layer.offload(file)
    whole = set(spec.linears) - schemes.keys()  # folds through layers that stay as they are would change them
    for name in whole:
        module.get_submodule(name).to(dtype)
    folds = tuple(fold for fold in meta_model.folds(index) if not whole & {fold.writer, *fold.readers})
    return ResidentBlock(index, module, arguments, layers, folds)


def _under(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values whose name begins with `prefix`, by the rest of it. Others are not looked at, and so not read."""
    return {name.removeprefix(prefix): values[name] for name in values if name.startswith(prefix)}


def all_layers(blocks: Sequence[ResidentBlock]) -> Iterator[QuantizedLinear]:
    """The layers of all blocks, in order."""
    for block in blocks:
        yield from block.layers.values()


def run_blocks(
    blocks: Sequence[ResidentBlock], x_BSD: Tensor, phase: Phase, *, activation_checkpointing: bool = False
) -> Tensor:
    """Hidden states after the blocks, computed with the weights of `phase`.

    With checkpointing a backward pass finds the inputs of the blocks only, and runs each block again before its own (Chen et al. 2016,
    arXiv 1604.06174). No rounding of it has moved then.
    """
    for layer in all_layers(blocks):
        layer.phase = phase
    for block in blocks:
        if activation_checkpointing:
            run = partial(run_block, block.module, arguments=block.arguments)
            x_BSD = checkpoint(run, x_BSD, use_reentrant=False, preserve_rng_state=False)
        else:
            x_BSD = run_block(block.module, x_BSD, block.arguments)
    return x_BSD
