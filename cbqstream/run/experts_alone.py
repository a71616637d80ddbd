"""Routed experts that are reconstructed alone (`--experts alone`): their sums for a stream, and their reconstruction in groups.

A group of experts is a durable result inside the window (`rundir/partial.py`), so a process that is killed loses one group at most.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from cbqstream.activations.store import ActivationStore, StoredValue
from cbqstream.activations.token_store import TokenStore
from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.tensors import WeightSource
from cbqstream.disk import ScratchFile
from cbqstream.packed.block_shard import shard_name
from cbqstream.packed.shard import write_tensors
from cbqstream.records import RunWarning
from cbqstream.rounding.registry import method_of
from cbqstream.run.expert_groups import NO_EXPERTS, ExpertGroups, FinishedExperts, token_shape
from cbqstream.run.finished import finished_source
from cbqstream.run.inputs import RunInputs
from cbqstream.rundir.partial import PartialResults
from cbqstream.windows.propagate import route
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.reconstruct import Reconstruction
from cbqstream.windows.resident_block import BlockSettings, ResidentBlock
from cbqstream.windows.routed_experts import Routed, RoutedExperts, add_experts

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
        store = TokenStore(token_shape(inputs, block.experts), file)
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
    shape = token_shape(inputs, experts)
    sums = TokenStore(shape, file, zeros=True)
    add_experts(experts, routed, source, inputs.compute, sums)
    stream.beside = {**stream.beside, experts.key: StoredValue(sums, (shape.seq_len, shape.hidden_size))}


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
        """Reconstruct the experts of blocks whose other layers are final, in order.

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
        store = TokenStore(token_shape(self._inputs, experts), self._file)
        routed = route(block, streams[1], store, self._inputs.compute, phase=Phase.HARD)
        self._routed[block.index] = routed
        if not any(name.startswith(f"{experts.name}.") for name in self._inputs.layers(block.index)):
            return NO_EXPERTS
        of_block = block, experts, routed, *streams, targets
        return ExpertGroups(
            self._inputs, self._settings, self._results, *of_block, self._file, self._doing, self._warn
        ).finish()
