"""The end-to-end stage after the last window, which trains the scales of the whole model, with one commit per epoch.

Each epoch starts from the scales that the epoch before it learned. The last epoch rewrites the shards of all blocks with the same codes.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.disk import FileDigest
from cbqstream.models.embedding_and_head import load_embedding_and_head
from cbqstream.packed.block_shard import read_scales, rewrite_scales
from cbqstream.packed.shard import write_tensors
from cbqstream.records import EpochReport
from cbqstream.run.finished import FinishedBlocks, read_window_state
from cbqstream.run.inputs import RunInputs
from cbqstream.run.streams import Streams
from cbqstream.run.window_report import costs_of
from cbqstream.rundir.chain import REFERENCE, WINDOW_STATE
from cbqstream.rundir.journal import Journal
from cbqstream.runtime.memory import release_free_memory
from cbqstream.runtime.seeds import generator_for
from cbqstream.runtime.timings import Timings
from cbqstream.windows.schedule import split_held_out
from cbqstream.windows.step_sizes import EndToEndData, StepSizes, StreamedModel, stored_divergence, train_epoch


def train_end_to_end(
    inputs: RunInputs, journal: Journal, streams: Streams, timings: Timings, tell: Callable[[str], None]
) -> Iterator[EpochReport]:
    """Run the epochs that are not committed yet, and yield the report of each. All windows must be committed.

    Args:
        inputs: inputs of the run.
        journal: journal of the run.
        streams: streams of the run, with the reference stream at the output of the last window.
        timings: timings of the run.
        tell: called with a line that describes the current step.
    """
    num_windows, num_epochs, compute = len(inputs.windows), inputs.num_epochs, inputs.compute
    if journal.chain.is_complete:
        return
    journal.chain.require_intact(*journal.chain.shards())  # rewriting a damaged shard would hide the damage
    blocks = FinishedBlocks(inputs, journal.chain)
    steps = _starting_steps(inputs, journal, blocks)
    journal.empty_tmp()
    reference, kept = streams.open(REFERENCE), range(inputs.windows[-1].stop, len(inputs.meta_model.blocks))
    if kept:
        reference = streams.passed(reference, [[index] for index in kept], REFERENCE, streams.original)
    with load_embedding_and_head(inputs.meta_model, inputs.source, device=compute.device, dtype=compute.dtype) as outer:
        data = EndToEndData(lambda segment: outer.enter(inputs.tokens[segment], streams.arguments), reference)
        model = StreamedModel(blocks.build, streams.arguments, steps, outer.head, compute)
        for epoch in range(journal.chain.next_window - num_windows, num_epochs):
            began = timings.now()
            tell(f"end to end, epoch {epoch + 1}/{num_epochs}")
            journal.new_folder("parts")
            before, after = _epoch(inputs, model, data, epoch)
            release_free_memory()
            last = epoch + 1 == num_epochs
            parts = _write_shards(inputs, journal, blocks, steps) if last else _write_state(inputs, journal, steps)
            costs = costs_of(timings.now().since(began), compute.device)
            report = EpochReport(epoch, num_epochs, before, after, costs)
            read, numerics = inputs.source.take_digests(), inputs.identity.numerics
            journal.commit(parts=parts, acts=None, source=read, numerics=numerics, report=report)
            yield report


def _epoch(inputs: RunInputs, model: StreamedModel, data: EndToEndData, epoch: int) -> tuple[float, float]:
    """Train one epoch, and revert it if the divergence on the held-out segments increased.

    Returns:
        Divergence on the held-out segments before and after the epoch.
    """
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
    """Scales of every block that are trained, with the values that earlier epochs learned.

    Scales of undersampled experts are not trained.
    """
    learned = Checkpoint({})
    undersampled = {path for report in journal.chain.window_reports for path in report.undersampled}
    if journal.chain.next_window > len(inputs.windows):
        learned = read_window_state(journal.chain)
    device, all_steps = inputs.compute.device, []
    for spec in inputs.meta_model.blocks:
        shard, steps = blocks.shard(spec.index), {}
        scales = {} if shard is None else read_scales(shard, device=device)
        for name in spec.linears:
            stored = spec.stored(name)
            if stored not in scales or f"{spec.prefix}.{name}" in undersampled:
                continue
            steps[name] = StepSizes.at(scales[stored])
            if stored in learned.infos:
                steps[name] = StepSizes(scales[stored], nn.Parameter(learned.read(stored, device=device)))
        all_steps.append(steps)
    return all_steps


def _write_state(inputs: RunInputs, journal: Journal, all_steps: list[dict[str, StepSizes]]) -> dict[str, FileDigest]:
    """Write the learned factors of all scales for the next epoch."""
    state: dict[str, Tensor] = {}
    for spec, steps in zip(inputs.meta_model.blocks, all_steps, strict=True):
        state |= {spec.stored(name): of_layer.theta for name, of_layer in steps.items()}
    return {WINDOW_STATE: write_tensors(journal.disk, journal.building / "parts" / WINDOW_STATE, state)}


def _write_shards(
    inputs: RunInputs, journal: Journal, blocks: FinishedBlocks, all_steps: list[dict[str, StepSizes]]
) -> dict[str, FileDigest]:
    """Write the shards of all blocks with the learned scales."""
    parts = {}
    for spec, steps in zip(inputs.meta_model.blocks, all_steps, strict=True):
        shard = blocks.shard(spec.index)
        if shard is not None:
            scales = {spec.stored(name): of_layer.stored() for name, of_layer in steps.items()}
            parts[shard.name] = rewrite_scales(journal.disk, journal.building / "parts", shard, scales)
    return parts
