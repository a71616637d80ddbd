"""The two streams of hidden states on disk, and their recomputation when a run resumes.

A window reads the streams that the window before it wrote. They also stay in memory, unless the memory mode keeps them on disk alone. If
they are missing or damaged, they are recomputed from the embeddings through the finished blocks, and must then have the checksums that were
committed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cbqstream.activations.memory_store import MemoryStore
from cbqstream.activations.store import ActivationStore, StoredValue, StreamShape
from cbqstream.activations.zarr_store import ZarrStore
from cbqstream.checkpoint.tensors import WeightSource
from cbqstream.disk import ScratchFile
from cbqstream.errors import InputError
from cbqstream.models.beside import create_beside, write_segments
from cbqstream.models.block import BlockArguments
from cbqstream.models.embedding_and_head import EmbeddingAndHead
from cbqstream.run.experts_alone import route_and_sum
from cbqstream.run.finished import FinishedBlocks, computing_block
from cbqstream.run.inputs import RunInputs
from cbqstream.rundir.chain import BESIDE, QUANTIZED, REFERENCE
from cbqstream.rundir.journal import Journal
from cbqstream.rundir.records import Checksums
from cbqstream.windows.propagate import propagate
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.read_block import with_experts
from cbqstream.windows.resident_block import ResidentBlock

Source = Callable[[int], WeightSource]
"""Function that gives the source of the tensors of a block from its number."""


class Streams:
    """The streams of a run. They are made by `enter`, after which they are stored on disk at the input of the next window.

    Args:
        inputs: inputs of the run.
        journal: journal of the run.
        arguments: keyword arguments of every block.
    """

    def __init__(self, inputs: RunInputs, journal: Journal, arguments: list[BlockArguments]) -> None:
        self._beside: dict[str, StoredValue] = {}
        self._inputs = inputs
        self._journal = journal
        self.arguments = arguments
        """Keyword arguments of every block."""
        self._shape = StreamShape(*inputs.stream_shape)
        self._resident = dict[Path, MemoryStore]()
        """Streams that stay in memory and are committed, or will be, by the folder that each has then."""

    @classmethod
    def enter(cls, inputs: RunInputs, journal: Journal, outer: EmbeddingAndHead) -> "Streams":
        """Find the keyword arguments of the blocks, and recompute the streams of the next window if they are missing or damaged.

        Arguments that depend on the tokens are stored beside the streams.

        Args:
            inputs: inputs of the run.
            journal: journal of the run.
            outer: the embedding of the model.

        Raises:
            InputError: the recomputed streams differ from what was committed.
        """
        streams = cls(inputs, journal, outer.block_arguments(inputs.tokens[0]))
        if not journal.chain.is_complete:
            folder, tokens_NS = journal.chain.path / BESIDE, inputs.tokens
            streams._beside = create_beside(folder, streams.arguments, len(tokens_NS), journal.disk)
            if streams._beside:
                write_segments(outer, streams.arguments, tokens_NS, None, streams._beside)
            if not streams._are_as_committed():
                streams._recompute(outer)
        return streams

    @property
    def _on_disk(self) -> bool:
        """Whether streams are on disk alone."""
        return self._inputs.compute.memory_mode.streams_on_disk

    @property
    def _folder(self) -> Path:
        """Folder of the streams that the next window or epoch reads."""
        return self._journal.chain.acts(self._journal.chain.next_window)

    def open(self, name: str) -> ZarrStore:
        """Open a stream at the input of the next window for reading."""
        path = self._folder / name
        self._resident = {place: held for place, held in self._resident.items() if place.parent == self._folder}
        resident = None if self._on_disk else self._resident.setdefault(path, MemoryStore(self._shape))
        store = ZarrStore.open(path, self._shape, self._journal.disk.measure, resident)
        store.beside = self._beside
        return store

    def behind(self, name: str, *, durable: bool = True) -> ZarrStore:
        """Create an empty stream at the output of the next window, which the window after it reads.

        Args:
            name: name of the stream.
            durable: whether the stream will be committed.
        """
        chain = self._journal.chain
        resident = None if self._on_disk else MemoryStore(self._shape)
        if resident is not None:
            self._resident[chain.acts(chain.next_window + 1) / name] = resident
        return self.new(f"acts/{name}", durable=durable, resident=resident)

    def temporary(self, name: str) -> ActivationStore:
        """Create an empty store that is not committed: in memory, or under its name in tmp/ if streams are on disk alone."""
        store = self.new(name, durable=False) if self._on_disk else MemoryStore(self._shape)
        store.beside = self._beside
        return store

    def new(self, name: str, *, durable: bool = True, resident: MemoryStore | None = None) -> ZarrStore:
        """Create an empty stream in tmp/.

        Args:
            name: path of the stream in tmp/.
            durable: whether the stream will be committed.
            resident: gets the segments that stay in memory, see `ZarrStore.create`.
        """
        path, disk = self._journal.building / name, self._journal.disk
        store = ZarrStore.create(path, self._shape, disk, durable=durable, resident=resident)
        store.beside = self._beside
        return store

    @contextmanager
    def file_of(self, what: str, *, on_disk: bool) -> Iterator[ScratchFile | None]:
        """A temporary file in tmp/ inside a `with`; None if its values are kept in memory.

        Args:
            what: name of the file.
            on_disk: whether the values are kept in the file.
        """
        if not on_disk:
            yield None
            return
        with self._journal.disk.scratch(self._journal.building / what) as file:
            yield file

    def original(self, index: int) -> WeightSource:
        """Source of a block of the original model."""
        return self._inputs.source

    def block(self, index: int, source: WeightSource) -> ResidentBlock:
        """A block to compute with.

        Args:
            index: number of the block.
            source: source of its tensors.
        """
        module, spec = computing_block(self._inputs, index, source), self._inputs.meta_model.blocks[index]
        experts = with_experts(module, spec, self._inputs.experts_alone(index))
        return ResidentBlock(index, module, self.arguments[index], experts=experts)

    def passed(
        self,
        source: ActivationStore,
        steps: Sequence[Sequence[int]],
        name: str,
        source_of: Source,
        *,
        durable: bool = False,
    ) -> ZarrStore:
        """Move a stream through blocks into a new stream. Hidden states are stored, and therefore rounded, after each step.

        Args:
            source: stream at the input of the first block.
            steps: numbers of the blocks of each step.
            name: path of the new stream in tmp/.
            source_of: gives the source of a block.
            durable: whether the new stream will be committed.
        """
        stream = source
        for position, step in enumerate([*steps, ()]):  # the last step is a copy
            last = position == len(steps)
            reached = self.new(name if last else f"{name}-{position}", durable=durable and last)
            blocks = [self.block(index, source_of(index)) for index in step]
            with self.file_of("tokens", on_disk=self._inputs.compute.memory_mode.expert_inputs_on_disk) as file:
                for block in blocks:
                    route_and_sum(self._inputs, block, stream, source_of(block.index), file)
                propagate(blocks, stream, reached, self._inputs.compute, phase=Phase.ORIGINAL)
            if isinstance(stream, ZarrStore) and stream is not source:
                for path in stream.paths:
                    self._journal.disk.remove_tree(path)
            stream = reached
        return reached

    def _steps(self) -> dict[str, list[range]]:
        """Numbers of the blocks through which the committed windows moved each stream, in one step per window."""
        windows, position = self._inputs.windows, self._journal.chain.next_window
        steps = {REFERENCE: [range(window.frontier, window.stop) for window in windows[:position]]}
        if position < len(windows):
            steps[QUANTIZED] = [range(window.start, window.next_start) for window in windows[:position]]
        return steps

    def _are_as_committed(self) -> bool:
        """Whether the streams are complete and undamaged; every chunk is read."""
        committed = self._journal.chain.committed_acts
        if committed is None:
            return False
        try:
            for name in self._steps():
                self.open(name).require_all(committed)
        except InputError:
            return False
        return True

    def _recompute(self, outer: EmbeddingAndHead) -> None:
        """Compute the streams of the next window from the embeddings, compare them with the commits, and store them in acts/.

        Raises:
            InputError: the streams differ from what was committed, although the numerics never changed.
        """
        journal = self._journal
        journal.empty_tmp()
        journal.new_folder("acts")
        start = self.temporary("embedded")
        for segment, ids_S in enumerate(self._inputs.tokens):
            start.write(segment, outer.embed(ids_S))
        if self._inputs.config.keep_first:
            kept = [[index] for index in range(self._inputs.config.keep_first)]
            start = self.passed(start, kept, "start", self.original)
        sources = {REFERENCE: self.original, QUANTIZED: FinishedBlocks(self._inputs, journal.chain).source}
        made, committed = dict[str, Checksums](), journal.chain.committed_acts
        durable = committed is not None
        for name, steps in self._steps().items():
            made |= self.passed(start, steps, f"acts/{name}", sources[name], durable=durable).tables()
        numerics = self._inputs.identity.numerics
        same_numerics = all(commit.numerics == numerics for commit in journal.chain.commits)
        if durable and made != committed and same_numerics:
            raise InputError(
                self._folder,
                "was missing or damaged, and the recomputed streams are not what was committed."
                " Restore the run directory, or use another --run-dir.",
            )
        journal.disk.remove_tree(self._folder)
        journal.publish_acts(self._folder, durable=durable)
