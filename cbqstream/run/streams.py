"""The two streams of hidden states on disk, and how they are brought to the window at which a run continues.

A window needs the streams that the window before it left. They are a cache: if they are lost or damaged they are recomputed, from the
embeddings through the finished blocks, and must have the checksums that were committed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from cbqstream.activations.store import StreamShape
from cbqstream.activations.zarr_store import ZarrStore
from cbqstream.errors import InputError
from cbqstream.models.block import BlockArguments
from cbqstream.models.embedding_and_head import EmbeddingAndHead
from cbqstream.run.finished import FinishedBlocks, computing_block
from cbqstream.run.inputs import RunInputs
from cbqstream.rundir.chain import QUANTIZED, REFERENCE
from cbqstream.rundir.journal import Journal
from cbqstream.windows.propagate import propagate
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.resident_block import ResidentBlock

Build = Callable[[int], nn.Module]
"""Makes a block by its number."""


class Streams:
    """The streams of a run. Made by `enter`, which leaves them on disk at the input of the next window."""

    def __init__(self, inputs: RunInputs, journal: Journal, arguments: list[BlockArguments]) -> None:
        self._inputs = inputs
        self._journal = journal
        self.arguments = arguments
        """Keyword arguments of every block."""
        self._shape = StreamShape(*inputs.stream_shape)

    @classmethod
    def enter(cls, inputs: RunInputs, journal: Journal, outer: EmbeddingAndHead) -> "Streams":
        """Find out how the model calls its blocks, and make sure that the streams of the next window exist.

        Raises:
            InputError: the streams were recomputed, and are not what was committed.
        """
        streams = cls(inputs, journal, outer.block_arguments(inputs.tokens[0]))
        if not journal.chain.is_complete and not streams._are_as_committed():
            streams._recompute(outer)
        return streams

    @property
    def _folder(self) -> Path:
        """Folder of the streams that the next window, or every epoch, reads."""
        return self._journal.chain.acts(self._journal.chain.next_window)

    def open(self, name: str) -> ZarrStore:
        """A stream at the input of the next window, to read."""
        return ZarrStore.open(self._folder / name, self._shape, self._journal.disk.measure)

    def new(self, name: str, *, durable: bool = True) -> ZarrStore:
        """An empty stream in tmp/."""
        return ZarrStore.create(self._journal.building / name, self._shape, self._journal.disk, durable=durable)

    def original(self, index: int) -> nn.Module:
        """A block of the original model."""
        return computing_block(self._inputs, index, self._inputs.source)

    def passed(
        self, source: ZarrStore, steps: Sequence[Sequence[int]], name: str, build: Build, *, durable: bool = False
    ) -> ZarrStore:
        """A new stream `name`: `source` after the blocks that `build` gives. It is stored, and so rounded, after each step.

        Args:
            source: stream at the input of the first block.
            steps: numbers of the blocks of each step.
            name: of the new stream, in tmp/.
            build: makes the blocks.
            durable: whether the new stream will be committed.
        """
        stream = source
        for position, step in enumerate([*steps, ()]):  # the last step is a copy
            last = position == len(steps)
            reached = self.new(name if last else f"{name}-{position}", durable=durable and last)
            blocks = [ResidentBlock(index, build(index), self.arguments[index]) for index in step]
            propagate(blocks, stream, reached, self._inputs.compute, phase=Phase.ORIGINAL)
            if stream is not source:
                self._journal.disk.remove_tree(stream.path)
            stream = reached
        return stream

    def _steps(self) -> dict[str, list[range]]:
        """Blocks that each stream has passed since the first window, in the steps in which the windows took them."""
        windows, position = self._inputs.windows, self._journal.chain.next_window
        steps = {REFERENCE: [range(window.frontier, window.stop) for window in windows[:position]]}
        if position < len(windows):
            steps[QUANTIZED] = [range(window.start, window.next_start) for window in windows[:position]]
        return steps

    def _are_as_committed(self) -> bool:
        """Whether the streams are complete and undamaged. Every chunk is read once, which a run that resumes has the time for."""
        committed = self._journal.chain.committed_acts
        if committed is None:
            return False
        try:
            for name in self._steps():
                self.open(name).require(committed[name], read=True)
        except InputError:
            return False
        return True

    def _recompute(self, outer: EmbeddingAndHead) -> None:
        journal = self._journal
        journal.empty_tmp()
        journal.new_folder("acts")
        start = self.new("embedded", durable=False)
        for segment, ids_S in enumerate(self._inputs.tokens):
            start.write(segment, outer.embed(ids_S))
        if self._inputs.config.keep_first:
            kept = [[index] for index in range(self._inputs.config.keep_first)]
            start = self.passed(start, kept, "start", self.original)
        builds = {REFERENCE: self.original, QUANTIZED: FinishedBlocks(self._inputs, journal.chain).build}
        made, committed = {}, journal.chain.committed_acts
        durable = committed is not None
        for name, steps in self._steps().items():
            made[name] = self.passed(start, steps, f"acts/{name}", builds[name], durable=durable).checksums()
        numerics = self._inputs.identity.numerics
        same_numerics = all(commit.numerics == numerics for commit in journal.chain.commits)
        if durable and made != committed and same_numerics:
            raise InputError(
                self._folder,
                "was lost, and the recomputed streams are not what was committed."
                " Restore the run directory, or use another --run-dir.",
            )
        journal.disk.remove_tree(self._folder)
        journal.publish_acts(self._folder, durable=durable)
