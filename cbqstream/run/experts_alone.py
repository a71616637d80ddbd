"""Routed experts that are reconstructed alone (`--experts alone`): their sums for a stream, and their reconstruction in groups.

A group of experts is a durable result inside the window (`rundir/partial.py`), so a process that is killed loses one group at most.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cbqstream.activations.store import ActivationStore, StoredValue, StreamShape
from cbqstream.activations.token_store import TokenStore
from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.tensors import WeightSource
from cbqstream.disk import ScratchFile
from cbqstream.errors import InputError
from cbqstream.numerics.slabs import SLAB_WEIGHTS
from cbqstream.packed.block_shard import shard_name
from cbqstream.packed.layouts import encode
from cbqstream.packed.shard import write_tensors
from cbqstream.records import RunNotice, RunWarning
from cbqstream.rounding.registry import method_of
from cbqstream.run.finished import finished_source
from cbqstream.run.inputs import RunInputs
from cbqstream.rundir.partial import PartialResult, PartialResults
from cbqstream.runtime.seeds import generator_for
from cbqstream.windows.expert_reconstruction import ExpertInputs, ExpertResult, LossWeights
from cbqstream.windows.propagate import route
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.reconstruct import NOT_FINITE, Reconstruction
from cbqstream.windows.resident_block import BlockSettings, ResidentBlock
from cbqstream.windows.routed_experts import Routed, RoutedExperts, add_experts

_MOST_REVERTED = 0.1
"""Largest accepted share of experts of a block whose loss was not finite."""
_DENSE = "dense"
"""Name of the result of the layers outside the experts."""


def route_and_sum(
    inputs: RunInputs,
    block: ResidentBlock,
    stream: ActivationStore,
    source: WeightSource,
    file: ScratchFile | None,
) -> None:
    """Compute the sums of the routed experts of a block for a stream, with which the block can then run on the stream.

    Args:
        inputs: inputs of the run.
        block: the block; nothing is done if its experts are in memory, or if it has none.
        stream: the stream at the input of the block; it gets the sums beside it.
        source: source of the weights of the experts.
        file: file of the values of all tokens; None keeps them in memory.
    """
    if block.experts is not None:
        store = TokenStore(_shape(inputs, block.experts), file)
        routed = route(block, stream, store, inputs.compute, phase=Phase.ORIGINAL)
        give_sums(inputs, block.experts, routed, stream, source, file)


def give_sums(
    inputs: RunInputs,
    experts: RoutedExperts,
    routed: Routed,
    stream: ActivationStore,
    source: WeightSource,
    file: ScratchFile | None,
) -> None:
    """Compute the sums of routed experts from their inputs, and put them beside a stream. See `route_and_sum`."""
    shape = _shape(inputs, experts)
    sums = TokenStore(shape, file, zeros=True)
    add_experts(experts, routed, source, inputs.compute, sums)
    stream.beside = {**stream.beside, experts.key: StoredValue(sums, (shape.seq_len, shape.hidden_size))}


def _shape(inputs: RunInputs, experts: RoutedExperts) -> StreamShape:
    return StreamShape(len(inputs.tokens), inputs.tokens.shape[1], experts.hidden_size)


@dataclass(frozen=True, slots=True)
class FinishedExperts:
    """The finished experts of a block."""

    layers: Mapping[str, Checkpoint]
    """File that holds each quantized layer, encoded, by the name of the layer in the block."""
    facts: Mapping[str, Mapping[str, Any]]
    """Facts about each expert by its path in the block, see `_facts`."""

    def tell(self, block: ResidentBlock) -> None:
        """Record the facts in the block, from which the report of the window is made."""
        for path, found in self.facts.items():
            names = [name for name in self.layers if name.startswith(f"{path}.")]
            block.tokens[f"{path}.up_proj"] = found["tokens"]
            block.sqnr_db |= {f"{path}.{name}": value for name, value in found["sqnr_db"].items()}
            block.vanished |= {f"{path}.{name}": value for name, value in found["vanished"].items()}
            block.undersampled.update(names if found["undersampled"] else ())

    @staticmethod
    def added_to(result: Reconstruction, finished: "FinishedExperts") -> Reconstruction:
        """The result of a window, with finished experts in the share of changed codes."""
        codes = result.codes + sum(found["codes"] for found in finished.facts.values())
        moved = result.changed * result.codes + sum(
            found["changed"] * found["codes"] for found in finished.facts.values()
        )
        return replace(result, changed=moved / max(codes, 1), codes=codes)

    def notice(self, prefix: str) -> RunNotice:
        """Sentence about the losses of the experts of a block with a module path."""
        number, reverted = len(self.facts), sum(found["reverted"] is not None for found in self.facts.values())
        before, after = (sum(found[key] for found in self.facts.values()) / number for key in ("before", "after"))
        return RunNotice(
            f"{prefix}: {number} experts alone, mean loss {before:.3g} -> {after:.3g}, {reverted} reverted"
        )


NO_EXPERTS = FinishedExperts({}, {})
"""The finished experts of a block that has none, or whose experts are in memory."""


class ExpertsAlone:
    """The routed experts of the blocks of a window, which are reconstructed alone. Blocks whose experts are in memory are left as they are.

    Args:
        inputs: inputs of the run.
        settings: settings with which blocks are quantized.
        results: results inside the window.
        file: file of the values of all tokens; None keeps them in memory.
        doing: called with the name of each step.
        warn: called with warnings.
    """

    def __init__(
        self,
        inputs: RunInputs,
        settings: BlockSettings,
        results: PartialResults,
        file: ScratchFile | None,
        doing: Callable[[str], None],
        warn: Callable[[RunWarning], None],
    ) -> None:
        self._warn = warn
        self._inputs, self._settings, self._results, self._file, self._doing = inputs, settings, results, file, doing
        self._routed: dict[int, Routed] = {}

    def add_sums(self, blocks: Sequence[ResidentBlock], stream: ActivationStore) -> None:
        """Compute the sums of the original experts of blocks for a stream, and put them beside it."""
        for block in blocks:
            route_and_sum(self._inputs, block, stream, self._inputs.source, self._file)

    def drop_sums(self, blocks: Sequence[ResidentBlock], stream: ActivationStore) -> None:
        """Free the memory of the sums beside a stream, unless codes in closed form need the stream again."""
        if not method_of(self._settings.reconstruction).closed_form:
            self._drop_sums(blocks, stream)

    def _drop_sums(self, blocks: Sequence[ResidentBlock], stream: ActivationStore) -> None:
        keys = {block.experts.key for block in blocks if block.experts is not None}
        stream.beside = {key: value for key, value in stream.beside.items() if key not in keys}

    def saved(self, blocks: Sequence[ResidentBlock], compute: Callable[[], Reconstruction]) -> Reconstruction:
        """Result of the reconstruction of the layers outside the experts; computed only if no interrupted process finished it.

        Args:
            blocks: the window, ready for its reconstruction.
            compute: reconstructs the window in place.
        """
        if all(block.experts is None for block in blocks):
            return compute()
        found = self._results.find(_DENSE)
        if found is not None:
            held = Checkpoint(read_header(found.file))
            for block in blocks:
                block.load(held.under(f"{block.index}.", self._inputs.compute.device))
            return Reconstruction(**found.facts)
        result = compute()
        state = {f"{block.index}.{name}": value for block in blocks for name, value in block.window_state().items()}
        self._results.add(_DENSE, partial(write_tensors, self._results.disk, tensors=state), asdict(result))
        return result

    def reconstruct(
        self,
        blocks: Sequence[ResidentBlock],
        reference: ActivationStore,
        quantized: ActivationStore,
        targets: ActivationStore,
    ) -> dict[int, FinishedExperts]:
        """Reconstruct the experts of blocks whose other layers are final.

        Args:
            blocks: the blocks.
            reference: reference stream at the input of the blocks.
            quantized: quantized stream at the input of the blocks.
            targets: targets for their output.

        Returns:
            The finished experts, by the number of the block.
        """
        for stream in (reference, quantized):
            self._drop_sums(blocks, stream)
        return {
            block.index: self._of_block(block, block.experts, (reference, quantized), targets)
            for block in blocks
            if block.experts is not None
        }

    def add_finished_sums(self, blocks: Sequence[ResidentBlock], stream: ActivationStore, shards: Path) -> None:
        """Compute the sums of the finished experts of blocks, and put them beside a stream.

        Args:
            blocks: the blocks.
            stream: quantized stream at the input of the blocks.
            shards: folder with the shards of the blocks.
        """
        for block in blocks:
            if block.experts is not None:
                source = finished_source(self._inputs, block.index, shards / shard_name(block.index))
                give_sums(self._inputs, block.experts, self._routed[block.index], stream, source, self._file)

    def _of_block(
        self,
        block: ResidentBlock,
        experts: RoutedExperts,
        streams: tuple[ActivationStore, ActivationStore],
        targets: ActivationStore,
    ) -> FinishedExperts:
        inputs, schemes = self._inputs, self._inputs.layers(block.index)
        # the inputs on the reference stream are recorded again, so that only two values of a token are in memory at once
        reference, routed = (
            route(block, stream, TokenStore(_shape(inputs, experts), self._file), inputs.compute, phase=phase)
            for stream, phase in zip(streams, (Phase.ORIGINAL, Phase.HARD), strict=True)
        )
        self._routed[block.index] = routed
        if not any(name.startswith(f"{experts.name}.") for name in schemes):
            return NO_EXPERTS
        given = ExpertInputs(
            experts,
            inputs.source,
            schemes,
            routed,
            reference.x,
            LossWeights.of(targets, inputs.config.reconstruction, experts.hidden_size),
            self._settings,
            inputs.compute,
            self._warn,
            inputs.config.calibration.all_experts,
        )
        layers, facts = dict[str, Checkpoint](), dict[str, Mapping[str, Any]]()
        parts = routed.by_expert(len(experts))
        for group in _groups(inputs, experts):
            found = self._group(given, block.index, group, parts)
            held = Checkpoint(read_header(found.file))
            for number in group:
                told = found.facts["experts"][str(number)]
                facts[f"{experts.name}.{number}"] = told
                layers |= {f"{experts.name}.{number}.{layer}": held for layer in told["sqnr_db"]}
        _require_finite(experts, facts)
        return FinishedExperts(layers, facts)

    def _group(
        self, given: ExpertInputs, index: int, group: range, parts: Sequence[tuple[Tensor, Tensor]]
    ) -> PartialResult:
        """The result of a group of experts; computed only if no interrupted process finished it."""
        name, source = f"experts-{group.start:05d}", self._inputs.source
        weights = [weight for number in group for weight in given.experts.layers(number).values()]
        found = self._results.find(name)
        if found is not None:
            source.expect(weights, found.facts["source"])
            return found
        self._doing(f"experts {group.start}-{group.stop - 1} of {len(given.experts)}")
        seed, made = self._inputs.config.seed, dict[int, ExpertResult]()
        for number in group:
            generators = [generator_for(seed, index, f"expert {number}: {what}") for what in ("order", "rounding")]
            made[number] = given.reconstruct(number, *parts[number], *generators)
        tensors = dict(_encoded(self._inputs, given.experts, made))
        write = partial(write_tensors, self._results.disk, tensors=tensors)
        facts = {"experts": {str(number): _facts(result) for number, result in made.items()}}
        return self._results.add(name, write, facts | {"source": source.digests_of(weights)})


def _require_finite(experts: RoutedExperts, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that training did not fail for many experts of a block. Otherwise most of them would be rounded to nearest.

    Raises:
        InputError: the loss was NaN or infinite for more than one expert and for more than a tenth of them.
    """
    failed = [path for path, found in facts.items() if found["reverted"] == NOT_FINITE]
    if len(failed) > max(1, _MOST_REVERTED * len(facts)):
        raise InputError(
            experts.prefix,
            f"the loss of {len(failed)} of {len(facts)} experts was not finite, first of {failed[0]}."
            " Use a smaller --max-shift or --scale-lr in a new run.",
        )


def _groups(inputs: RunInputs, experts: RoutedExperts) -> Iterator[range]:
    """Numbers of the experts of each group."""
    weights = sum(math.prod(inputs.meta_model.infos[name].shape) for name in experts.layers(0).values())
    number = max(1, SLAB_WEIGHTS // weights)
    for first in range(0, len(experts), number):
        yield range(first, min(first + number, len(experts)))


def _encoded(
    inputs: RunInputs, experts: RoutedExperts, made: Mapping[int, ExpertResult]
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tensor of the finished experts, as they are stored in the result."""
    for number, result in made.items():
        for layer, weight in result.weights.items():
            stored = experts.layers(number)[layer]
            for part, value in encode(weight, scale_dtype=inputs.source.infos[stored].dtype).items():
                yield f"{stored.removesuffix('.weight')}.{part}", value


def _facts(result: ExpertResult) -> dict[str, Any]:
    """Plain values about a finished expert."""
    learned = result.reconstruction
    return {
        "tokens": result.tokens,
        "undersampled": result.undersampled,
        "before": learned.loss_before,
        "after": learned.loss_after,
        "reverted": learned.reverted,
        "changed": learned.changed,
        "codes": learned.codes,
        "sqnr_db": dict(result.sqnr_db),
        "vanished": dict(result.vanished),
    }
