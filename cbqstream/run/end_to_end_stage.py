"""The stage after the last window: the step sizes of the whole model learn end to end, a commit an epoch.

Each epoch carries what was learned to the next; the last one writes the shards of all blocks again, with the same codes.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.disk import FileDigest
from cbqstream.models.embedding_and_head import load_embedding_and_head
from cbqstream.packed.block_shard import read_scales, rewrite_scales
from cbqstream.packed.shard import write_tensors
from cbqstream.records import EpochReport
from cbqstream.run.finished import FinishedBlocks, read_carry
from cbqstream.run.inputs import RunInputs
from cbqstream.run.streams import Streams
from cbqstream.rundir.chain import CARRY, REFERENCE
from cbqstream.rundir.journal import Journal
from cbqstream.runtime.device import peak_device_bytes
from cbqstream.runtime.memory import peak_resident_bytes, release_free_memory
from cbqstream.runtime.seeds import generator_for
from cbqstream.windows.schedule import split_held_out
from cbqstream.windows.step_sizes import EndToEndData, StepSizes, StreamedModel, stored_divergence, train_epoch


def learn_end_to_end(
    inputs: RunInputs, journal: Journal, streams: Streams, tell: Callable[[str], None]
) -> Iterator[EpochReport]:
    """Do the epochs that are not committed yet, after the windows, which all are.

    Args:
        inputs: of the run.
        journal: of the run.
        streams: the reference stream lies where the last window left it.
        tell: told what is being done.
    """
    num_windows, num_epochs, compute = len(inputs.windows), inputs.num_epochs, inputs.compute
    if journal.chain.is_complete:
        return
    journal.chain.require_intact(*journal.chain.shards())  # what is written again would hide a damage
    blocks = FinishedBlocks(inputs, journal.chain)
    steps = _starting_steps(inputs, journal, blocks)
    journal.empty_tmp()
    reference, kept = streams.open(REFERENCE), range(inputs.windows[-1].stop, len(inputs.meta_model.blocks))
    if kept:
        reference = streams.passed(reference, [[index] for index in kept], REFERENCE, streams.original)
    with load_embedding_and_head(inputs.meta_model, inputs.source, device=compute.device, dtype=compute.dtype) as outer:
        data = EndToEndData(lambda segment: outer.embed(inputs.tokens[segment]), reference)
        model = StreamedModel(blocks.build, streams.arguments, steps, outer.head, compute)
        for epoch in range(journal.chain.next_window - num_windows, num_epochs):
            began = time.monotonic()
            tell(f"end to end, epoch {epoch + 1}/{num_epochs}")
            journal.new_folder("parts")
            before, after = _epoch(inputs, model, data, epoch)
            release_free_memory()
            last = epoch + 1 == num_epochs
            parts = _write_shards(inputs, journal, blocks, steps) if last else _write_carry(inputs, journal, steps)
            seconds = time.monotonic() - began
            peaks = peak_resident_bytes(), peak_device_bytes(compute.device)
            report = EpochReport(epoch, num_epochs, before, after, seconds, *peaks)
            inputs.commit(journal, parts=parts, acts=None, report=report)
            yield report


def _epoch(inputs: RunInputs, model: StreamedModel, data: EndToEndData, epoch: int) -> tuple[float, float]:
    """Train, and judge by the held-out segments: the divergence before and after. What was not better is reverted."""
    settings = inputs.config.reconstruction
    training, held_out = split_held_out(len(inputs.tokens))
    learned = [steps.theta for block in model.steps for steps in block.values()]
    start = [theta.detach().to("cpu", copy=True) for theta in learned]
    before = stored_divergence(model, data, held_out)
    first, last = (settings.end_to_end_lr * (1 - at / inputs.num_epochs) for at in (epoch, epoch + 1))
    order = generator_for(inputs.config.seed, len(inputs.windows) + epoch, "order")
    train_epoch(model, data, training, (first, last), order)
    after = stored_divergence(model, data, held_out)
    if after <= before:
        return before, after
    with torch.no_grad():
        for theta, value in zip(learned, start, strict=True):
            theta.copy_(value)
    return before, before


def _starting_steps(inputs: RunInputs, journal: Journal, blocks: FinishedBlocks) -> list[dict[str, StepSizes]]:
    """The step sizes of every block that learn, with what the epochs before learned: not those of experts that saw too little."""
    carry = Checkpoint({})
    undersampled = {path for commit in journal.chain.commits for path in commit["report"].get("undersampled", ())}
    if journal.chain.next_window > len(inputs.windows):
        carry = read_carry(journal.chain)
    device, all_steps = inputs.compute.device, []
    for spec in inputs.meta_model.blocks:
        shard, steps = blocks.shard(spec.index), {}
        scales = {} if shard is None else read_scales(shard, device=device)
        for name in spec.linears:
            stored = spec.stored(name)
            if stored not in scales or f"{spec.prefix}.{name}" in undersampled:
                continue
            steps[name] = StepSizes.at(scales[stored])
            if stored in carry.infos:
                steps[name] = StepSizes(scales[stored], nn.Parameter(carry.read(stored, device=device)))
        all_steps.append(steps)
    return all_steps


def _write_carry(inputs: RunInputs, journal: Journal, all_steps: list[dict[str, StepSizes]]) -> dict[str, FileDigest]:
    """What was learned, for the next epoch."""
    carry: dict[str, Tensor] = {}
    for spec, steps in zip(inputs.meta_model.blocks, all_steps, strict=True):
        carry |= {spec.stored(name): of_layer.theta for name, of_layer in steps.items()}
    return {CARRY: write_tensors(journal.disk, journal.building / "parts" / CARRY, carry)}


def _write_shards(
    inputs: RunInputs, journal: Journal, blocks: FinishedBlocks, all_steps: list[dict[str, StepSizes]]
) -> dict[str, FileDigest]:
    """The shards with the step sizes that were learned."""
    parts = {}
    for spec, steps in zip(inputs.meta_model.blocks, all_steps, strict=True):
        shard = blocks.shard(spec.index)
        if shard is not None:
            scales = {spec.stored(name): of_layer.stored() for name, of_layer in steps.items()}
            parts[shard.name] = rewrite_scales(journal.disk, journal.building / "parts", shard, scales)
    return parts
