"""Cross-Block Quantization (arXiv 2312.07950) of a model, window by window. The only module that wires the stages.

For each window of transformer blocks:

    1. read its blocks
    2. targets: roll the reference stream over the new blocks, T1; run the window on the quantized stream, T2; keep a T1 + (1 - a) T2
    3. rescale the outlier channels of the new blocks and give them a grid and a rounding; the others go on where the last window left them
    4. reconstruct: learn step sizes and rounding; the last window sees the model's predictions too
    5. harden and write the blocks that leave; keep the roundings of those that stay
    6. move the quantized stream past the blocks that leave
    7. commit

After the last window the step sizes of all blocks may learn together (`run/end_to_end.py`); then the model is put together.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cbqstream.activations.zarr_store import ZarrStore
from cbqstream.checkpoint.header import read_header
from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.config import QuantizeConfig
from cbqstream.disk import Disk, FileDigest
from cbqstream.errors import DeviceMemoryError, UsageError
from cbqstream.memory import peak_resident_bytes, release_free_memory, return_large_blocks
from cbqstream.models.block import build_block
from cbqstream.models.ends import model_ends
from cbqstream.packed.block_shard import write_block
from cbqstream.packed.format import quantization_config
from cbqstream.packed.output import assemble
from cbqstream.packed.shard import write_tensors
from cbqstream.records import EpochReport, Window, WindowReport
from cbqstream.run.end_to_end import learn_end_to_end
from cbqstream.run.identity import require_same
from cbqstream.run.inputs import RunInputs, open_inputs
from cbqstream.run.journal import CARRY, QUANTIZED, REFERENCE, Journal, open_journal, read_run
from cbqstream.run.seeds import generator_for
from cbqstream.run.streams import Streams
from cbqstream.windows.propagate import mix_targets, propagate
from cbqstream.windows.quantized_linear import Phase, replace_linears
from cbqstream.windows.reconstruct import Predictions, Reconstruction, WindowData, reconstruct
from cbqstream.windows.resident import BlockSettings, ResidentBlock

Listener = Callable[[str | WindowReport | EpochReport], None]
"""Is told what is being done, and what happened in each window and in each epoch after them."""


def quantize(config: QuantizeConfig, listener: Listener = lambda event: None, disk: Disk | None = None) -> Path:
    """Quantize a model, or go on with the run that was begun.

    Args:
        config: all settings.
        listener: told of progress.
        disk: does the writing; tests give one that they watch.

    Returns:
        The folder with the quantized model.

    Raises:
        CbqstreamError: see `errors.py`; nothing that was committed is lost.
    """
    return_large_blocks()
    inputs = open_inputs(config)
    out, run = Path(config.out), config.run_path
    if (run / "run.json").exists():
        require_same(run, read_run(run)["identity"], inputs.identity)
    elif _is_occupied(out):
        raise UsageError(f"{out}: exists and is not empty. Give another OUT.")
    sizes = {"windows": len(inputs.windows), "epochs": inputs.num_epochs}
    content = {"identity": inputs.identity, "config": config.to_dict(), **sizes}
    with open_journal(run, content, disk or Disk()) as journal:
        require_same(run, read_run(run)["identity"], inputs.identity)  # again, now that nobody else can change it
        if _is_occupied(out):
            if journal.is_complete and journal.is_result(out):
                return out
            raise UsageError(f"{out}: exists, is not empty and is not the result of this run. Give another OUT.")
        try:
            job = _Job(inputs, journal, listener)
            for window in inputs.windows[journal.next_window :]:
                listener(job.quantize_window(window))
                release_free_memory()
            for report in learn_end_to_end(inputs, journal, job.streams, listener):
                listener(report)
        except torch.OutOfMemoryError as error:
            remedy = "Use a smaller --batch-size or --window-size in a new run"
            raise DeviceMemoryError(
                f"window {journal.next_window + 1} needs more device memory than there is. {remedy}."
            ) from error
        listener("writing the model")
        job.finish(out)
    return out


def _is_occupied(out: Path) -> bool:
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


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
        with model_ends(inputs.skeleton, inputs.checkpoint, device=compute.device, dtype=compute.dtype) as ends:
            self.streams = Streams.enter(inputs, journal, ends)

    def quantize_window(self, window: Window) -> WindowReport:
        """One window, from one committed state to the next."""
        began, settings, compute = time.monotonic(), self.inputs.config.reconstruction, self.inputs.compute
        is_last = window.index + 1 == len(self.inputs.windows)
        self.journal.empty_tmp()
        self.journal.new_folder("parts")
        self.journal.new_folder("acts")
        reference, quantized = self.streams.open(REFERENCE), self.streams.open(QUANTIZED)
        reference_out, targets = self.streams.new(f"acts/{REFERENCE}"), self.streams.new("targets", durable=False)

        # 1. read the blocks
        self._tell(window, "reading")
        blocks = [self._read_block(index) for index in range(window.start, window.stop)]
        new = blocks[window.frontier - window.start :]
        leaving, staying = blocks[: window.next_start - window.start], blocks[window.next_start - window.start :]

        # 2. targets, and statistics of the inputs on the way
        self._tell(window, "targets")
        propagate(new, reference, reference_out, compute, phase=Phase.ORIGINAL)
        for block in new:
            block.watch_inputs(self.inputs.tokens.numel(), self.settings)
        mix_targets(blocks, quantized, reference_out, targets, compute, a=settings.target_mix)

        # 3. outliers, grids and roundings
        self._start_roundings(window, blocks)

        # 4. reconstruct
        self._tell(window, "reconstruction")
        order = generator_for(self.inputs.config.seed, window.index, "order")
        with self._predictions(window, reference_out) as predictions:
            result = reconstruct(blocks, WindowData(quantized, targets, compute, predictions), settings, order)

        # 5. harden what leaves, carry what stays
        self._tell(window, "writing")
        parts = self._write_parts(leaving, staying)

        # 6. move the quantized stream on
        acts = None
        if not is_last:
            quantized_out = self.streams.new(f"acts/{QUANTIZED}")
            propagate(leaving, quantized, quantized_out, compute, phase=Phase.HARD)
            acts = {REFERENCE: reference_out.checksums(), QUANTIZED: quantized_out.checksums()}
        elif self.inputs.num_epochs:
            acts = {REFERENCE: reference_out.checksums()}

        # 7. commit
        report = self._report(window, result, time.monotonic() - began)
        self.journal.commit(window.index, parts=parts, acts=acts, report=report.to_dict())
        return report

    def finish(self, out: Path) -> None:
        """Put the finished model together."""
        self.journal.empty_tmp()
        inputs, config = self.inputs, self.inputs.config
        last = len(inputs.skeleton.blocks) - config.keep_last
        quantized = inputs.skeleton.blocks[config.keep_first : last]
        kept = [*inputs.skeleton.blocks[: config.keep_first], *inputs.skeleton.blocks[last:]]
        outside = inputs.skeleton.outer_linears
        not_quantized = [*outside, *(f"{spec.prefix}.{name}" for spec in kept for name in spec.linears)]
        assemble(
            self.journal.disk,
            out,
            source_folder=Path(config.model),
            source=inputs.checkpoint,
            shards=self.journal.shards(),
            replaced={name for spec in quantized for name in spec.tensors.values()},
            config={**inputs.model, "quantization_config": quantization_config(config.scheme, not_quantized)},
        )

    def _read_block(self, index: int) -> ResidentBlock:
        inputs = self.inputs
        module = build_block(
            inputs.skeleton,
            index,
            inputs.checkpoint,
            device=inputs.compute.device,
            dtype=inputs.compute.dtype,
            linear_dtype=None,
        )
        spec = inputs.skeleton.blocks[index]
        layers = replace_linears(module, spec.linears, inputs.config.scheme)
        return ResidentBlock(index, module, self.streams.arguments[index], layers, inputs.skeleton.folds)

    @contextmanager
    def _predictions(self, window: Window, reference_out: ZarrStore) -> Iterator[Predictions | None]:
        """The model's head, where the window learns and ends with the last block."""
        inputs, settings, where = self.inputs, self.inputs.config.reconstruction, self.inputs.compute
        learns = settings.rounding != "none" and settings.epochs and settings.head_weight
        if not learns or window.stop < len(inputs.skeleton.blocks):
            yield None
            return
        with model_ends(inputs.skeleton, inputs.checkpoint, device=where.device, dtype=where.dtype) as ends:
            yield Predictions(ends.head, reference_out)

    def _start_roundings(self, window: Window, blocks: list[ResidentBlock]) -> None:
        config, carried = self.inputs.config, {}
        if window.frontier > window.start:
            carry = Checkpoint(read_header(self.journal.parts(window.index - 1) / CARRY))
            carried = {name: carry.read(name, device=self.inputs.compute.device) for name in carry.infos}
        for block in blocks:
            generator = generator_for(config.seed, block.index, "rounding")
            if block.index >= window.frontier:
                block.start(self.settings, generator)
            else:
                prefix = f"{block.index}."
                own = {name.removeprefix(prefix): value for name, value in carried.items() if name.startswith(prefix)}
                block.go_on(self.settings, generator, own)

    def _write_parts(self, leaving: list[ResidentBlock], staying: list[ResidentBlock]) -> dict[str, FileDigest]:
        folder, disk = self.journal.building / "parts", self.journal.disk
        digests = {}
        for block in leaving:
            hard = block.harden(self.inputs.compute.dtype)
            spec, source = self.inputs.skeleton.blocks[block.index], self.inputs.checkpoint
            name, digest = write_block(disk, folder, spec, hard, block.rescaled(), source)
            digests[name] = digest
        if staying:
            carry = {f"{block.index}.{name}": value for block in staying for name, value in block.carry().items()}
            digests[CARRY] = write_tensors(disk, folder / CARRY, carry)
        return digests

    def _tell(self, window: Window, doing: str) -> None:
        self.listener(
            f"window {window.index + 1}/{len(self.inputs.windows)} blocks {window.start}-{window.stop - 1}: {doing}"
        )

    def _report(self, window: Window, result: Reconstruction, seconds: float) -> WindowReport:
        return WindowReport(
            window,
            len(self.inputs.windows),
            result.loss_before,
            result.loss_after,
            result.changed,
            seconds,
            peak_resident_bytes(),
        )
