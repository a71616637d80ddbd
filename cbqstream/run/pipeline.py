"""Cross-Block Quantization (arXiv 2312.07950) of a model, window by window. The only module that wires the stages.

For each window of transformer blocks:

    1. read its blocks
    2. targets: roll the reference stream over the new blocks, T1; run the window on the quantized stream, T2; keep a T1 + (1 - a) T2
    3. rescale the outlier channels of the new blocks and give them a grid and a rounding; the others go on where the last window left them
    4. reconstruct: learn step sizes and rounding; the last window sees the model's predictions too
    5. harden and write the blocks that leave; keep the roundings of those that stay
    6. move the quantized stream past the blocks that leave
    7. commit

After the last window the step sizes of all blocks may learn together (`run/end_to_end_stage.py`); then the model is put together.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cbqstream.activations.zarr_store import ZarrStore
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.config import QuantizeConfig
from cbqstream.disk import Disk, FileDigest, ScratchFile
from cbqstream.errors import StoppedError, UsageError
from cbqstream.models.embedding_and_head import load_embedding_and_head
from cbqstream.models.experts import tokens_by_expert
from cbqstream.packed.block_shard import write_block
from cbqstream.packed.output import is_occupied
from cbqstream.packed.shard import write_tensors
from cbqstream.records import EpochReport, RunWarning, Window, WindowReport
from cbqstream.run.end_to_end_stage import learn_end_to_end
from cbqstream.run.finished import read_carry
from cbqstream.run.inputs import RunInputs, open_inputs
from cbqstream.run.limits import (
    disk_bytes,
    model_warnings,
    over_limit,
    require_finite_windows,
    room_for,
    undersampled_experts,
)
from cbqstream.run.result import write_result
from cbqstream.run.streams import Streams
from cbqstream.rundir.chain import CARRY, QUANTIZED, REFERENCE, Chain
from cbqstream.rundir.identity import require_same
from cbqstream.rundir.journal import Journal, open_journal
from cbqstream.runtime.device import installed_version, peak_device_bytes
from cbqstream.runtime.memory import (
    is_out_of_device_memory,
    peak_resident_bytes,
    release_free_memory,
    return_large_blocks,
)
from cbqstream.runtime.seeds import generator_for
from cbqstream.windows.propagate import mix_targets, propagate
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.reconstruct import Predictions, Reconstruction, WindowData, reconstruct
from cbqstream.windows.resident import BlockSettings, ResidentBlock, read_block

Event = str | WindowReport | EpochReport | RunWarning
Listener = Callable[[Event], None]
"""Is told what is being done, what happened in each window and in each epoch after them, and what is odd about the inputs."""


def quantize(
    config: QuantizeConfig,
    listener: Listener = lambda event: None,
    disk: Disk | None = None,
    *,
    stop_after_window: int | None = None,
    allow_numerics_change: bool = False,
    allow_shared_run_dir: bool = False,
) -> Path:
    """Quantize a model, or go on with the run that was begun.

    Args:
        config: all settings.
        listener: told of progress.
        disk: does the writing; tests give one that they watch.
        stop_after_window: leave with StoppedError when this many windows are committed.
        allow_numerics_change: go on although threads, device or versions are others. The result is then that of neither.
        allow_shared_run_dir: use a run directory that other users can change.

    Returns:
        The folder with the quantized model.

    Raises:
        CbqstreamError: see `errors.py`; nothing that was committed is lost.
    """
    inputs = open_inputs(config)
    return_large_blocks(memory_mode=inputs.compute.memory_mode.offload)
    out, run = Path(config.out), config.run_path
    if (run / "run.json").exists():
        _require_same(Chain.read(run), inputs, allow_numerics_change=allow_numerics_change)
    elif is_occupied(out):
        raise UsageError(f"{out}: exists and is not empty. Give another OUT.")
    for warning in model_warnings(inputs):
        listener(warning)
    sizes = {"windows": len(inputs.windows), "epochs": inputs.num_epochs, "stream": inputs.stream_shape}
    content = {
        "version": installed_version("cbqstream") or "unknown",
        "identity": inputs.identity,
        "config": config.to_dict(),
        **sizes,
    }
    with open_journal(run, disk or Disk(), content, shared=allow_shared_run_dir) as journal:
        # again, now that nobody else can change it
        _require_same(journal.chain, inputs, allow_numerics_change=allow_numerics_change)
        if is_occupied(out):
            if journal.chain.is_complete and journal.chain.is_result(out):
                return out
            raise UsageError(f"{out}: exists, is not empty and is not the result of this run. Give another OUT.")
        inputs.source.remember(journal.chain.source_digests)
        with room_for("making the streams", disk_bytes(inputs, streams=_missing_streams(journal.chain)), run):
            job = _Job(inputs, journal, listener)
        for window in inputs.windows[journal.chain.next_window : stop_after_window]:
            require_finite_windows(journal.chain)
            blocks = inputs.meta_model.blocks[window.start : window.stop]
            # both streams after it, and the targets
            needed = disk_bytes(inputs, streams=3, blocks=blocks, in_a_window=True)
            with room_for(f"window {window.index + 1}", needed, run), _reading_ahead(inputs, window.index + 1):
                report = _twice(job, window)
            _tell(listener, report, *inputs.source.take_warnings(), *over_limit(config, report))
            release_free_memory()
        require_finite_windows(journal.chain)
        if stop_after_window is not None and stop_after_window < journal.chain.num_commits:
            raise StoppedError(f"stopped after window {journal.chain.next_window}, as asked.")
        needed = 0 if journal.chain.is_complete else disk_bytes(inputs, streams=1, blocks=inputs.meta_model.blocks)
        with room_for("learning end to end", needed, run):
            for epoch in learn_end_to_end(inputs, journal, job.streams, listener):
                _tell(listener, epoch, *over_limit(config, epoch))
        listener("writing the model")
        write_result(inputs, journal, out)
    return out


def _tell(listener: Listener, *events: Event) -> None:
    for event in events:
        listener(event)


def _missing_streams(chain: Chain) -> int:
    """How many streams are on disk at most while those of the next window are made."""
    return 0 if chain.is_complete or chain.acts(chain.next_window).exists() else 4


def _reading_ahead(inputs: RunInputs, position: int) -> AbstractContextManager[None]:
    """The new blocks of a window are read while the one before it is at work, where there is one."""
    coming = inputs.windows[position : position + 1]
    blocks = [block for window in coming for block in inputs.meta_model.blocks[window.frontier : window.stop]]
    return inputs.source.reading_ahead([name for block in blocks for name in block.tensors.values()])


def _twice(job: "_Job", window: Window) -> WindowReport:
    """A window; once more when device memory ran out, which may only have been in pieces."""
    try:
        return job.quantize_window(window)
    except RuntimeError as error:
        if not is_out_of_device_memory(error):
            raise
        # as long as it is handled it holds what the window had
    release_free_memory()
    torch.cuda.empty_cache()
    return job.quantize_window(window)


def _require_same(chain: Chain, inputs: RunInputs, *, allow_numerics_change: bool) -> None:
    numerics = inputs.identity["numerics"] if allow_numerics_change else chain.numerics
    require_same(chain.path, {**chain.run["identity"], "numerics": numerics}, inputs.identity)


class _Job:
    """The steps, on one set of inputs and one journal."""

    def __init__(self, inputs: RunInputs, journal: Journal, listener: Listener) -> None:
        self.inputs = inputs
        self.journal = journal
        self.listener = listener
        config = inputs.config
        self.settings = BlockSettings(config.scheme, config.reconstruction, config.outliers)
        listener("embedding the calibration segments")
        compute = inputs.compute
        with load_embedding_and_head(
            inputs.meta_model, inputs.source, device=compute.device, dtype=compute.dtype, only="embed"
        ) as outer:
            self.streams = Streams.enter(inputs, journal, outer)

    def quantize_window(self, window: Window) -> WindowReport:
        """One window, from one committed state to the next."""
        self.journal.empty_tmp()
        with self._file_for_layers() as file:
            return self._quantize_window(window, file)

    def _quantize_window(self, window: Window, file: ScratchFile | None) -> WindowReport:
        began = self._clocks()
        settings, compute = self.inputs.config.reconstruction, self.inputs.compute
        is_last = window.index + 1 == len(self.inputs.windows)
        self.journal.new_folder("parts")
        self.journal.new_folder("acts")
        reference, quantized = self.streams.open(REFERENCE), self.streams.open(QUANTIZED)
        reference_stays = bool(not is_last or self.inputs.num_epochs)
        reference_out = self.streams.new(f"acts/{REFERENCE}", durable=reference_stays)
        targets = self.streams.new("targets", durable=False)

        # 1. read the blocks
        self._tell(window, "reading")
        blocks = [self._read_block(index, file) for index in range(window.start, window.stop)]
        new = blocks[window.frontier - window.start :]
        leaving, staying = blocks[: window.next_start - window.start], blocks[window.next_start - window.start :]

        # 2. targets, and statistics of the inputs on the way
        self._tell(window, "targets")
        propagate(new, reference, reference_out, compute, phase=Phase.ORIGINAL)
        for block in new:
            block.watch_inputs(
                self.inputs.tokens.numel(), self.settings, all_experts=self.inputs.config.calibration.all_experts
            )
        mix_targets(blocks, quantized, reference_out, targets, compute, a=settings.target_mix)

        # 3. outliers, grids and roundings
        carry = read_carry(self.journal.chain) if window.frontier > window.start else Checkpoint({})
        self._start_roundings(window, blocks, carry)
        fresh = {block.index: block.state() for block in new}

        # 4. reconstruct
        self._tell(window, "reconstruction")
        order = generator_for(self.inputs.config.seed, window.index, "order")
        with self._predictions(window, reference_out) as predictions:
            data = WindowData(quantized, targets, compute, predictions)
            result = reconstruct(
                blocks, data, settings, order, lambda block: fresh.get(block.index) or self._carried(carry, block.index)
            )

        # 5. harden what leaves, carry what stays
        self._tell(window, "writing")
        parts = self._write_parts(leaving, staying, file)

        # 6. move the quantized stream on
        acts = None
        if not is_last:
            quantized_out = self.streams.new(f"acts/{QUANTIZED}")
            propagate(leaving, quantized, quantized_out, compute, phase=Phase.HARD)
            acts = {REFERENCE: reference_out.checksums(), QUANTIZED: quantized_out.checksums()}
        elif reference_stays:
            acts = {REFERENCE: reference_out.checksums()}

        # 7. commit
        spent = [now - then for now, then in zip(self._clocks(), began, strict=True)]
        report = self._report(window, result, new, leaving, *spent)
        self.inputs.commit(self.journal, parts=parts, acts=acts, report=report)
        return report

    def _read_block(self, index: int, file: ScratchFile | None) -> ResidentBlock:
        inputs = self.inputs
        return read_block(
            inputs.meta_model,
            index,
            inputs.source,
            inputs.layers(index),
            self.streams.arguments[index],
            inputs.compute,
            self.settings.scratch,
            file,
        )

    @contextmanager
    def _file_for_layers(self) -> Iterator[ScratchFile | None]:
        """Where the layers of a window lie while they are not used; None where all of them stay in memory."""
        if not self.inputs.compute.memory_mode.offload:
            yield None
            return
        with self.journal.disk.scratch(self.journal.building / "layers") as file:
            yield file

    @contextmanager
    def _predictions(self, window: Window, reference_out: ZarrStore) -> Iterator[Predictions | None]:
        """The model's head, where the window learns and ends with the last block."""
        inputs, settings, where = self.inputs, self.inputs.config.reconstruction, self.inputs.compute
        learns = settings.rounding != "nearest" and settings.epochs and settings.head_weight
        if not learns or window.stop < len(inputs.meta_model.blocks):
            yield None
            return
        with load_embedding_and_head(
            inputs.meta_model, inputs.source, device=where.device, dtype=where.dtype, only="head"
        ) as outer:
            yield Predictions(outer.head, reference_out)

    def _start_roundings(self, window: Window, blocks: list[ResidentBlock], carry: Checkpoint) -> None:
        for block in blocks:
            generator = generator_for(self.inputs.config.seed, block.index, "rounding")
            if block.index >= window.frontier:
                block.start(self.settings, generator)
                if block.undersampled:
                    self.listener(undersampled_experts(self.inputs.meta_model.blocks[block.index].prefix, block))
            else:
                block.go_on(self.settings, generator, self._carried(carry, block.index))

    def _carried(self, carry: Checkpoint, index: int) -> Mapping[str, Tensor]:
        """What the window before left of a block."""
        return carry.under(f"{index}.", self.inputs.compute.device)

    def _write_parts(
        self, leaving: list[ResidentBlock], staying: list[ResidentBlock], file: ScratchFile | None
    ) -> dict[str, FileDigest]:
        folder, disk = self.journal.building / "parts", self.journal.disk
        digests = {}
        for block in leaving:
            spec, source = self.inputs.meta_model.blocks[block.index], self.inputs.source
            name, digest = write_block(disk, folder, spec, block.harden(), block.rescaled(), source, file)
            digests[name] = digest
        if staying:
            carry = {f"{block.index}.{name}": value for block in staying for name, value in block.carry().items()}
            digests[CARRY] = write_tensors(disk, folder / CARRY, carry)
        return digests

    def _tell(self, window: Window, doing: str) -> None:
        self.listener(
            f"window {window.index + 1}/{len(self.inputs.windows)} blocks {window.start}-{window.stop - 1}: {doing}"
        )

    def _clocks(self) -> tuple[float, float, float]:
        """Seconds: the time, what reading took so far, and what writing took, where it was waited for."""
        disk, streams = self.journal.disk, self.streams
        reading = self.inputs.source.seconds + streams.waited + disk.reading_seconds
        return time.monotonic(), reading, disk.seconds - streams.hidden

    def _report(
        self,
        window: Window,
        result: Reconstruction,
        new: list[ResidentBlock],
        leaving: list[ResidentBlock],
        seconds: float,
        reading: float,
        writing: float,
    ) -> WindowReport:
        prefix = {block.index: self.inputs.meta_model.blocks[block.index].prefix for block in (*new, *leaving)}
        return WindowReport(
            window,
            len(self.inputs.windows),
            result.loss_before,
            result.loss_after,
            result.reverted,
            result.changed,
            seconds,
            reading,
            writing,
            peak_resident_bytes(),
            experts={
                f"{prefix[block.index]}.{path}": counts
                for block in new
                for path, counts in tokens_by_expert(block.tokens).items()
            },
            sqnr_db={
                f"{prefix[block.index]}.{name}": value for block in leaving for name, value in block.sqnr_db.items()
            },
            scales={
                f"{prefix[block.index]}.{writer}": (int((scale != 1).sum()), scale.max().item())
                for block in new
                for writer, scale in block.scales.items()
            },
            peak_vram=peak_device_bytes(self.inputs.compute.device),
            undersampled=[f"{prefix[block.index]}.{name}" for block in new for name in sorted(block.undersampled)],
        )
