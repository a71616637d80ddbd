"""The stage after the last window: the step sizes of the whole model learn end to end, a commit an epoch.

Each epoch carries what was learned to the next; the last one writes the shards of all blocks again, with the same codes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cbqstream.activations.store import StreamShape
from cbqstream.activations.zarr_store import ZarrStore
from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.memory import peak_resident_bytes, release_free_memory
from cbqstream.models.block import BlockArguments, build_block
from cbqstream.models.ends import model_ends
from cbqstream.packed.block_shard import read_scales, rewrite_scales, shard_name
from cbqstream.packed.shard import write_tensors
from cbqstream.packed.source import PackedSource
from cbqstream.records import EpochReport, WeightSource
from cbqstream.run.inputs import RunInputs
from cbqstream.run.journal import CARRY, REFERENCE, Journal
from cbqstream.run.seeds import generator_for
from cbqstream.windows.end_to_end import EndToEndData, StepSizes, StreamedModel, stored_divergence, train_epoch
from cbqstream.windows.reconstruct import split_guard


def learn_end_to_end(
    inputs: RunInputs, journal: Journal, arguments: Sequence[BlockArguments], tell: Callable[[str], None]
) -> Iterator[EpochReport]:
    """Do the epochs that are not committed yet, after the windows, which all are.

    Args:
        inputs: of the run.
        journal: of the run.
        arguments: how the model calls its blocks.
        tell: told what is being done.
    """
    num_windows, num_epochs, compute = len(inputs.windows), inputs.num_epochs, inputs.compute
    if journal.next_window >= num_windows + num_epochs:
        return
    blocks = _Blocks(inputs, journal)
    steps = blocks.starting_steps()
    segments, length = inputs.tokens.shape
    shape = StreamShape(segments, length, inputs.skeleton.hidden_size)
    reference = ZarrStore.open(journal.acts(num_windows) / REFERENCE, shape)
    with model_ends(inputs.skeleton, inputs.checkpoint, device=compute.device, dtype=compute.dtype) as ends:
        data = EndToEndData(lambda segment: ends.embed(inputs.tokens[segment]), reference)
        model = StreamedModel(blocks.build, arguments, steps, ends.head, compute)
        for epoch in range(journal.next_window - num_windows, num_epochs):
            began = time.monotonic()
            tell(f"end to end, epoch {epoch + 1}/{num_epochs}")
            journal.empty_tmp()
            journal.new_folder("parts")
            before, after = _epoch(inputs, model, data, epoch)
            release_free_memory()
            parts = blocks.write_shards(steps) if epoch + 1 == num_epochs else blocks.write_carry(steps)
            seconds = time.monotonic() - began
            report = EpochReport(epoch, num_epochs, before, after, seconds, peak_resident_bytes())
            journal.commit(num_windows + epoch, parts=parts, acts=None, report=report.to_dict())
            yield report


def _epoch(inputs: RunInputs, model: StreamedModel, data: EndToEndData, epoch: int) -> tuple[float, float]:
    """Train, and judge by the guard: the divergence before and after. What was not better is taken back."""
    settings = inputs.config.reconstruction
    training, guard = split_guard(len(inputs.tokens))
    learned = [steps.theta for block in model.steps for steps in block.values()]
    start = [theta.detach().clone() for theta in learned]
    before = stored_divergence(model, data, guard)
    first, last = (settings.end_to_end_lr * (1 - at / inputs.num_epochs) for at in (epoch, epoch + 1))
    order = generator_for(inputs.config.seed, len(inputs.windows) + epoch, "order")
    train_epoch(model, data, training, (first, last), order)
    after = stored_divergence(model, data, guard)
    if after <= before:
        return before, after
    with torch.no_grad():
        for theta, value in zip(learned, start, strict=True):
            theta.copy_(value)
    return before, before


class _Blocks:
    """The finished blocks on disk."""

    def __init__(self, inputs: RunInputs, journal: Journal) -> None:
        self._inputs = inputs
        self._journal = journal
        self._shards = {path.name: path for path in journal.shards()}

    def build(self, index: int) -> nn.Module:
        """A block with its weights dequantized, or as they were where it stays in full precision."""
        inputs, shard = self._inputs, self._shards.get(shard_name(index))
        source: WeightSource = inputs.checkpoint
        if shard is not None:
            source = PackedSource(Checkpoint(read_header(shard)), inputs.config.scheme)
        dtype = inputs.compute.dtype
        return build_block(
            inputs.skeleton, index, source, device=inputs.compute.device, dtype=dtype, linear_dtype=dtype
        )

    def starting_steps(self) -> list[dict[str, StepSizes]]:
        """The step sizes of every block, with what the epochs before learned."""
        carry = Checkpoint({})
        if self._journal.next_window > len(self._inputs.windows):
            carry = Checkpoint(read_header(self._journal.parts(self._journal.next_window - 1) / CARRY))
        device, blocks = self._inputs.compute.device, []
        for spec in self._inputs.skeleton.blocks:
            shard, steps = self._shards.get(shard_name(spec.index)), {}
            for layer, scale_OG in read_scales(shard, device=device).items() if shard is not None else ():
                steps[layer.removeprefix(f"{spec.prefix}.")] = StepSizes.at(scale_OG)
                if layer in carry.infos:
                    theta_OG = carry.read(layer, device=device)
                    steps[layer.removeprefix(f"{spec.prefix}.")] = StepSizes(scale_OG, nn.Parameter(theta_OG))
            blocks.append(steps)
        return blocks

    def write_carry(self, blocks: list[dict[str, StepSizes]]) -> dict[str, list[Any]]:
        """What was learned, for the next epoch."""
        carry: dict[str, Tensor] = {}
        for spec, steps in zip(self._inputs.skeleton.blocks, blocks, strict=True):
            carry |= {f"{spec.prefix}.{name}": of_layer.theta for name, of_layer in steps.items()}
        digest = write_tensors(self._journal.disk, self._journal.building / "parts" / CARRY, carry)
        return {CARRY: [digest.size, digest.sha256]}

    def write_shards(self, blocks: list[dict[str, StepSizes]]) -> dict[str, list[Any]]:
        """The shards with the step sizes that were learned."""
        parts, folder = {}, self._journal.building / "parts"
        for spec, steps in zip(self._inputs.skeleton.blocks, blocks, strict=True):
            if steps:
                scales = {f"{spec.prefix}.{name}": of_layer.stored() for name, of_layer in steps.items()}
                shard = self._shards[shard_name(spec.index)]
                digest = rewrite_scales(self._journal.disk, folder, shard, scales)
                parts[shard.name] = [digest.size, digest.sha256]
        return parts
