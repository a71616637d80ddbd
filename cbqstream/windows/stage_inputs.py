"""Inputs of the layers of a block in both streams, one stage of the block after the other.

A stage is the layers that read the same input, such as q_proj, k_proj and v_proj; the layers of all experts that do are a stage together.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from torch import Tensor

from cbqstream.activations.read_ahead import in_batches, read_batches
from cbqstream.activations.store import ActivationStore
from cbqstream.errors import InputError
from cbqstream.models.families import EXPERT
from cbqstream.records import Compute
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.resident_block import ResidentBlock, as_batch, run_blocks, values_beside


class _AllSeenError(Exception):
    """All inputs of a stage are known, so the rest of the block need not run."""


@dataclass(frozen=True, slots=True)
class SharedInput:
    """Layers that read the same input, in the order in which they are called."""

    layers: tuple[str, ...]

    @property
    def first(self) -> str:
        """Name of the layer whose input is looked at."""
        return self.layers[0]

    @property
    def is_of_expert(self) -> bool:
        """Whether the layers belong to an expert, to which the router sends other tokens in each stream."""
        return EXPERT.search(self.first) is not None


@dataclass(frozen=True, slots=True)
class StageInputs:
    """Passes of segments through a block in both streams, for the inputs of its layers.

    In the reference stream the layers compute with their original weights, in the quantized stream with their hard weights.
    """

    block: ResidentBlock
    reference: ActivationStore
    """Reference stream at the input of the block."""
    quantized: ActivationStore
    """Quantized stream at the input of the block."""
    compute: Compute

    def stages(self) -> list[list[SharedInput]]:
        """The stages of the block, in the order in which they are called.

        Raises:
            InputError: a layer is never called.
        """
        alike = {name: EXPERT.sub(".*.", name) for name in self.block.layers}
        first: dict[
            str, str
        ] = {}  # the layer that reads the same input first, by layer; layers of experts without their number
        for batch in in_batches(range(self.quantized.shape.num_segments), self.compute.batch_size):
            seen: dict[tuple[int, int, int], str] = {}
            kept: list[Tensor] = []  # so that no two inputs have the same address
            for name, x in self._calls([batch]):
                kept.append(x)
                other = seen.setdefault((x.data_ptr(), x.numel(), x._version), name)
                first.setdefault(alike[name], alike[other])
            if first.keys() >= set(alike.values()):
                break
        for name in alike:
            if alike[name] not in first:
                raise InputError(f"block {self.block.index}", f"{name} is never called. Use --ignore {name}.")
        order = {name: position for position, name in enumerate(first)}
        stages: dict[str, dict[str, list[str]]] = {}
        for name in sorted(alike, key=lambda name: order[alike[name]]):
            expert = EXPERT.search(name)
            stage = stages.setdefault(first[alike[name]], {})
            stage.setdefault("" if expert is None else expert[1], []).append(name)
        return [[SharedInput(tuple(layers)) for layers in stage.values()] for stage in stages.values()]

    def read(
        self, stage: Sequence[SharedInput], segments: Sequence[int]
    ) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]:
        """The inputs of a stage, batch by batch, by the name of the first layer that reads them.

        Args:
            stage: layers whose inputs are read; the layers before them have their codes.
            segments: numbers of the segments.

        Yields:
            The inputs [T, I] in the reference stream, without those of experts, and in the quantized stream. An expert may have none.
        """
        names = {shared.first for shared in stage}
        known = {shared.first for shared in stage if not shared.is_of_expert}
        batches = in_batches(segments, self.compute.batch_size)
        references = self._inputs(self.reference, Phase.ORIGINAL, known, batches) if known else ({} for _ in batches)
        yield from zip(references, self._inputs(self.quantized, Phase.HARD, names, batches), strict=True)

    def _calls(self, batches: Sequence[Sequence[int]]) -> list[tuple[str, Tensor]]:
        """Names and inputs of all layers in the order in which they are called, in the quantized stream."""
        calls: list[tuple[str, Tensor]] = []
        with self._watching(self.block.layers, lambda name, x: calls.append((name, x))):
            for run in self._runs(self.quantized, Phase.HARD, batches):
                run()
        return calls

    def _inputs(
        self, stream: ActivationStore, phase: Phase, names: Collection[str], batches: Sequence[Sequence[int]]
    ) -> Iterator[Mapping[str, Tensor]]:
        """Inputs [T, I] of layers, batch by batch. A pass ends as soon as all of them are known."""
        for run in self._runs(stream, phase, batches):
            found: dict[str, Tensor] = {}

            def see(name: str, x: Tensor, found: dict[str, Tensor] = found) -> None:
                found[name] = x.flatten(0, -2)
                if len(found) == len(names):
                    raise _AllSeenError

            with self._watching(names, see), suppress(_AllSeenError):
                run()
            yield found

    def _runs(
        self, stream: ActivationStore, phase: Phase, batches: Sequence[Sequence[int]]
    ) -> Iterator[Callable[[], object]]:
        """For each batch, a function that runs the block."""
        beside = values_beside([self.block], stream)
        stores = [stream, *(value.store for value in beside.values())]
        for x_BSD, *values in read_batches(stores, batches, self.compute.device):
            x, own = x_BSD.to(self.compute.dtype), as_batch(beside, values)
            yield lambda x=x, own=own: run_blocks([self.block], x, phase, own)  # type: ignore[misc]

    @contextmanager
    def _watching(self, names: Collection[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Call `see` with the name and the input of each of the layers, before the layer computes."""
        with ExitStack() as hooks:
            for name in names:
                layer = self.block.layers[name]
                handle = layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
                hooks.callback(handle.remove)
            yield
