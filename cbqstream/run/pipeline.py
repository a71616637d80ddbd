"""Cross-Block Quantization (arXiv 2312.07950) of a model, window by window. Only this module connects the stages.

Two streams of hidden states are stored on disk: the reference stream, which the original blocks compute, and the quantized stream, which
the finished quantized blocks compute. Each window of transformer blocks is quantized in eight steps:

    1. Read the blocks of the window.
    2. Compute the targets: move the reference stream through the new blocks (T1), run the window on the quantized stream with its original
       weights (T2), and store the target a * T1 + (1 - a) * T2, where a is `target_mix`. Statistics of the inputs of the new blocks are
       gathered with T2.
    3. Find the transforms of the new blocks, and give each of their layers a quantization grid and a `Rounding`. The other blocks continue
       from the state that the window before saved.
    4. Reconstruct: train scales and roundings so that the output of the window is close to the target. With the rounding `gptq`, compute
       the codes of one layer after the other in closed form instead.
    5. With `--experts alone`, reconstruct each routed expert of the blocks that leave, alone on its tokens (`experts_alone.py`).
    6. Harden the blocks that leave the window (fix every weight to its final level) and pack them. Save the state of the blocks that stay.
    7. Move the quantized stream through the blocks that leave, unless the window is the last.
    8. Commit the window.

After the last window, the scales of all blocks may be trained end to end (`end_to_end_stage.py`). `result.py` assembles the model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from cbqstream.activations.zarr_store import ZarrStore
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.config import QuantizeConfig
from cbqstream.disk import Disk, FileDigest, ScratchFile, is_occupied
from cbqstream.errors import StoppedError, UsageError
from cbqstream.models.embedding_and_head import EmbeddingAndHead, Part, load_embedding_and_head
from cbqstream.packed.block_shard import write_block
from cbqstream.packed.shard import write_tensors
from cbqstream.planning.layer_schemes import quantized_share
from cbqstream.records import EpochReport, RunNotice, RunWarning, Window, WindowReport
from cbqstream.rounding.registry import method_of
from cbqstream.run.end_to_end_stage import train_end_to_end
from cbqstream.run.expert_groups import NO_EXPERTS, FinishedExperts
from cbqstream.run.experts_alone import ExpertsAlone
from cbqstream.run.finished import read_window_state
from cbqstream.run.inputs import RunInputs, open_inputs
from cbqstream.run.limits import disk_bytes, missing_streams, over_limit, room_for
from cbqstream.run.result import write_result
from cbqstream.run.streams import Streams
from cbqstream.run.warnings import model_warnings, require_finite_windows, undersampled_experts, vanished_rows
from cbqstream.run.window_report import window_report
from cbqstream.rundir.chain import QUANTIZED, REFERENCE, WINDOW_STATE, Chain, is_run
from cbqstream.rundir.identity import require_same
from cbqstream.rundir.journal import Journal, open_journal
from cbqstream.rundir.records import RunRecord
from cbqstream.runtime.device import choose_device, fixed_numerics, installed_version
from cbqstream.runtime.memory import is_out_of_device_memory, release_free_memory, return_large_blocks
from cbqstream.runtime.seeds import generator_for
from cbqstream.runtime.timings import Timings
from cbqstream.windows.closed_form import round_in_closed_form
from cbqstream.windows.propagate import mix_targets, propagate
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.read_block import read_block
from cbqstream.windows.reconstruct import Predictions, WindowData, reconstruct
from cbqstream.windows.resident_block import BlockSettings, ResidentBlock
from cbqstream.windows.stage_inputs import StageInputs

Event = str | WindowReport | EpochReport | RunWarning | RunNotice
Listener = Callable[[Event], None]
"""Function that is called with a description of the current step, with reports of windows and epochs, with warnings and with notices."""


def quantize(
    config: QuantizeConfig,
    listener: Listener = lambda event: None,
    disk: Disk | None = None,
    *,
    stop_after_window: int | None = None,
    allow_numerics_change: bool = False,
    allow_shared_run_dir: bool = False,
    allow_partial: bool = False,
    allow_links: bool = False,
) -> Path:
    """Quantize a model, or resume the run that was begun with the same settings.

    Args:
        config: settings of the run.
        listener: called with progress.
        disk: used for all writes; a new one by default.
        stop_after_window: number of committed windows, counted from the start of the run, after which it stops with StoppedError.
        allow_numerics_change: resume with another number of threads, another device or other versions. The result then differs
            from that of a whole run with the old numerics, and from that of a whole run with the new ones.
        allow_shared_run_dir: use a run directory that other users can change.
        allow_partial: quantize a model most of whose block weights stay in full precision. A run that was begun is resumed in any case.
        allow_links: read shards of the source that are links to files outside its folder.

    Returns:
        Folder of the quantized model.

    Raises:
        CbqstreamError: see `errors.py` for its subclasses. Committed windows are not lost.
    """
    device, timings = choose_device(config.device), Timings()
    with fixed_numerics(device, config.threads) as threads:
        out, run = Path(config.out), config.run_path
        partial = allow_partial or is_run(run)
        inputs = open_inputs(config, device, threads, timings.measure, allow_partial=partial, allow_links=allow_links)
        return_large_blocks(offloading=inputs.compute.memory_mode.offload)
        if is_run(run):
            _require_same(Chain.read(run), inputs, allow_numerics_change=allow_numerics_change)
        for warning in model_warnings(inputs):
            listener(warning)
        version = installed_version("cbqstream") or "unknown"
        sizes = len(inputs.windows), inputs.num_epochs, inputs.stream_shape
        record = RunRecord(version, inputs.identity, config, *sizes)
        disk = disk or Disk(measure=timings.measure)
        with open_journal(run, disk, record, shared=allow_shared_run_dir) as journal:
            # checked again, because no other process can change the run directory from here on
            _require_same(journal.chain, inputs, allow_numerics_change=allow_numerics_change)
            if is_occupied(out):
                if journal.chain.is_complete and journal.chain.is_result(out):
                    return out
                raise UsageError(f"{out}: exists, is not empty and is not the result of this run. Give another OUT.")
            _quantize_model(_Run(inputs, journal, timings, listener), stop_after_window)
            listener("writing the model")
            write_result(inputs, journal, out)
            listener(
                RunNotice(f"quantized: {quantized_share(config, inputs.meta_model):.1%} of the weights of the blocks")
            )
    return out


def _quantize_model(run: "_Run", stop_after_window: int | None) -> None:
    """Quantize the windows and run the epochs that are not committed yet.

    Args:
        run: the run.
        stop_after_window: number of committed windows after which the run stops; None runs to the end.

    Raises:
        StoppedError: the run was stopped after the window.
    """
    inputs, journal, config, folder = run.inputs, run.journal, run.inputs.config, run.inputs.config.run_path
    inputs.source.remember(journal.chain.source_digests)
    needed = disk_bytes(inputs, streams=missing_streams(journal.chain), beside=not journal.chain.is_complete)
    with room_for("making the streams", needed, folder):
        run.listener("embedding the calibration segments")
        with _loaded(inputs, "embedding") as embedding:
            streams = Streams.enter(inputs, journal, embedding)
    windows = _Windows(run, streams)
    for window in inputs.windows[journal.chain.next_window : stop_after_window]:
        require_finite_windows(journal.chain)
        blocks = inputs.meta_model.blocks[window.start : window.stop]
        # the window writes both streams behind it, and the targets unless they are in memory
        written = 3 if inputs.compute.memory_mode.streams_on_disk else 2
        needed = disk_bytes(inputs, streams=written, blocks=blocks, in_a_window=True)
        with room_for(f"window {window.index + 1}", needed, folder), inputs.reading_ahead(window.index + 1):
            report = _quantize_with_retry(windows, window)
        run.tell(report, *inputs.source.take_warnings(), *over_limit(config, report))
        release_free_memory()
    require_finite_windows(journal.chain)
    if stop_after_window is not None and stop_after_window < journal.chain.num_commits:
        raise StoppedError(f"stopped after window {journal.chain.next_window}, as asked.")
    needed = 0 if journal.chain.is_complete else disk_bytes(inputs, streams=1, blocks=inputs.meta_model.blocks)
    with room_for("the end-to-end stage", needed, folder):
        for epoch in train_end_to_end(inputs, journal, streams, run.timings, run.listener):
            run.tell(epoch, *over_limit(config, epoch))


@dataclass(frozen=True, slots=True)
class _Run:
    """Objects that all windows of a run share."""

    inputs: RunInputs
    journal: Journal
    timings: Timings
    listener: Listener

    def tell(self, *events: Event) -> None:
        """Call the listener with each event."""
        for event in events:
            self.listener(event)


def _quantize_with_retry(windows: "_Windows", window: Window) -> WindowReport:
    """Quantize a window, and try once more if device memory runs out, because the memory may be fragmented."""
    try:
        return windows.quantize(window)
    except RuntimeError as error:
        if not is_out_of_device_memory(error):
            raise
        # memory is released after this block, because the error refers to the tensors of the window
    release_free_memory()
    torch.cuda.empty_cache()
    return windows.quantize(window)


def _require_same(chain: Chain, inputs: RunInputs, *, allow_numerics_change: bool) -> None:
    """Check that a run was begun with the same inputs and settings, and with the same numerics unless they may change.

    Raises:
        IdentityError: something differs.
    """
    numerics = inputs.identity.numerics if allow_numerics_change else chain.numerics
    require_same(chain.path, chain.run.identity.with_numerics(numerics), inputs.identity)


def _loaded(inputs: RunInputs, only: Part) -> AbstractContextManager[EmbeddingAndHead]:
    compute = inputs.compute
    return load_embedding_and_head(
        inputs.meta_model, inputs.source, device=compute.device, dtype=compute.dtype, only=only
    )


class _Windows:
    """Quantization of the windows of a run, one after the other."""

    def __init__(self, run: _Run, streams: Streams) -> None:
        self._run = run
        self._inputs, self._journal, self._streams = run.inputs, run.journal, streams
        config = run.inputs.config
        self._settings = BlockSettings(config.scheme, config.reconstruction, config.transforms)

    def quantize(self, window: Window) -> WindowReport:
        """Quantize one window and commit it."""
        self._journal.empty_tmp()
        for name in ("parts", "acts"):
            self._journal.new_folder(name)
        mode, file_of = self._inputs.compute.memory_mode, self._streams.file_of
        with (
            file_of("layers", on_disk=mode.offload) as layers,
            file_of("tokens", on_disk=mode.expert_inputs_on_disk) as tokens,
        ):
            return self._quantize(window, layers, tokens)

    def _quantize(self, window: Window, file: ScratchFile | None, tokens: ScratchFile | None) -> WindowReport:
        inputs, settings, compute = self._inputs, self._inputs.config.reconstruction, self._inputs.compute
        began, is_last = self._run.timings.now(), window.index + 1 == len(inputs.windows)
        reference, quantized = self._streams.open(REFERENCE), self._streams.open(QUANTIZED)
        keeps_reference = bool(not is_last or inputs.num_epochs)  # read by the next window or the end-to-end stage
        reference_out = self._streams.behind(REFERENCE, durable=keeps_reference)
        targets = self._streams.temporary("targets")

        # 1. Read the blocks.
        self._doing(window, "reading")
        blocks = [self._read_block(index, file) for index in range(window.start, window.stop)]
        new = blocks[window.frontier - window.start :]
        leaving, staying = blocks[: window.next_start - window.start], blocks[window.next_start - window.start :]

        # 2. Compute the targets, and gather statistics of the inputs of the new blocks.
        self._doing(window, "targets")
        experts = self._experts(window, tokens)
        experts.add_sums(new, reference)
        propagate(new, reference, reference_out, compute, phase=Phase.ORIGINAL)
        experts.drop_sums(new, reference)
        experts.add_sums(blocks, quantized)
        for block in new:
            block.watch_inputs(inputs.tokens.numel(), self._settings, all_experts=inputs.config.calibration.all_experts)
        mix_targets(blocks, quantized, reference_out, targets, compute, a=settings.target_mix)

        # 3. Find transforms, grids and roundings.
        starting_state = self._start_roundings(window, blocks)

        # 4. Reconstruct.
        self._doing(window, "reconstruction")
        with self._predictions(window, reference_out) as predictions:
            data = WindowData(quantized, targets, compute, settings, predictions)
            order = generator_for(inputs.config.seed, window.index, "order")
            codes = self._closed_form(blocks, reference, quantized)
            result = experts.saved(blocks, lambda: reconstruct(blocks, data, order, starting_state, codes))

        # 5. Reconstruct the experts that are not in the window, one after the other.
        finished = experts.reconstruct(leaving, reference, quantized, targets)

        # 6. Harden the blocks that leave, and save the state of the blocks that stay.
        self._doing(window, "writing")
        parts = self._write_parts(leaving, staying, file, finished)

        # 7. Move the quantized stream.
        acts = reference_out.tables() if keeps_reference else None
        if not is_last:
            quantized_out = self._streams.behind(QUANTIZED)
            experts.add_finished_sums(leaving, quantized, self._journal.building / "parts")
            propagate(leaving, quantized, quantized_out, compute, phase=Phase.HARD)
            acts = reference_out.tables() | quantized_out.tables()

        # 8. Commit.
        result, spent = (
            reduce(FinishedExperts.added_to, finished.values(), result),
            self._run.timings.now().since(began),
        )
        report = window_report(inputs, window, result, new, leaving, spent)
        read, numerics = inputs.source.take_digests(), inputs.identity.numerics
        self._journal.commit(parts=parts, acts=acts, source=read, numerics=numerics, report=report)
        return report

    def _experts(self, window: Window, file: ScratchFile | None) -> ExpertsAlone:
        results = self._journal.partial_results(self._inputs.identity.numerics)
        return ExpertsAlone(
            self._inputs, self._settings, results, file, partial(self._doing, window), self._run.listener
        )

    def _closed_form(
        self, blocks: list[ResidentBlock], reference: ZarrStore, quantized: ZarrStore
    ) -> Callable[[], None] | None:
        """Function that gives a block its codes in closed form; None if the rounding method is trained."""
        settings = self._inputs.config.reconstruction
        if not method_of(settings).closed_form:
            return None
        (block,) = blocks
        inputs = StageInputs(block, reference, quantized, self._inputs.compute)
        return partial(round_in_closed_form, inputs, settings, self._run.listener)

    def _read_block(self, index: int, file: ScratchFile | None) -> ResidentBlock:
        inputs = self._inputs
        return read_block(
            inputs.meta_model,
            index,
            inputs.source,
            inputs.layers(index),
            self._streams.arguments[index],
            inputs.compute,
            self._settings.scratch,
            file,
            experts_alone=inputs.config.reconstruction.experts == "alone",
        )

    @contextmanager
    def _predictions(self, window: Window, reference_out: ZarrStore) -> Iterator[Predictions | None]:
        """The head of the model and the reference stream, if the window ends with the last block and is trained; otherwise None."""
        settings = self._inputs.config.reconstruction
        learns = method_of(settings).learns and settings.epochs and settings.head_weight
        if not learns or window.stop < len(self._inputs.meta_model.blocks):
            yield None
            return
        with _loaded(self._inputs, "head") as loaded:
            yield Predictions(loaded.head, reference_out)

    def _start_roundings(
        self, window: Window, blocks: list[ResidentBlock]
    ) -> Callable[[ResidentBlock], Mapping[str, Tensor]]:
        """Start or resume the roundings of the blocks.

        Returns:
            Function that gives the state to which a block returns if training increases the loss on the held-out segments.
        """
        saved = read_window_state(self._journal.chain) if window.frontier > window.start else Checkpoint({})
        initial, closed_form = {}, method_of(self._settings.reconstruction).closed_form
        for block in blocks:
            generator = generator_for(self._inputs.config.seed, block.index, "rounding")
            if block.index >= window.frontier:
                block.start(self._settings, generator)
                initial[block.index] = block.state()
                if block.undersampled:
                    prefix = self._inputs.meta_model.blocks[block.index].prefix
                    self._run.tell(undersampled_experts(prefix, block, closed_form=closed_form))
            else:
                block.resume(self._settings, generator, self._state(saved, block))
        return lambda block: initial.get(block.index) or self._state(saved, block)

    def _state(self, saved: Checkpoint, block: ResidentBlock) -> Mapping[str, Tensor]:
        """State of one block, read from the window state that the window before saved."""
        return saved.under(f"{block.index}.", self._inputs.compute.device)

    def _write_parts(
        self,
        leaving: list[ResidentBlock],
        staying: list[ResidentBlock],
        file: ScratchFile | None,
        finished: Mapping[int, FinishedExperts],
    ) -> dict[str, FileDigest]:
        folder, disk = self._journal.building / "parts", self._journal.disk
        digests = {}
        for block in leaving:
            spec, source = self._inputs.meta_model.blocks[block.index], self._inputs.source
            experts = finished.get(block.index, NO_EXPERTS)
            name, digest = write_block(
                disk, folder, spec, block.harden(), block.stored, source, file, finished=experts.layers
            )
            digests[name] = digest
            if experts.facts:
                experts.tell(block)
                self._run.tell(experts.notice(spec.prefix))
                closed_form = method_of(self._settings.reconstruction).closed_form
                if block.undersampled:
                    self._run.tell(undersampled_experts(spec.prefix, block, closed_form=closed_form))
            self._run.tell(*vanished_rows(spec.prefix, block))
        if staying:
            state = {
                f"{block.index}.{name}": value for block in staying for name, value in block.window_state().items()
            }
            digests[WINDOW_STATE] = write_tensors(disk, folder / WINDOW_STATE, state)
        return digests

    def _doing(self, window: Window, what: str) -> None:
        blocks = f"blocks {window.start}-{window.stop - 1}"
        self._run.listener(f"window {window.index + 1}/{len(self._inputs.windows)} {blocks}: {what}")
