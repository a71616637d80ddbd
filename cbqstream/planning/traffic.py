"""Disk space of a run, and the bytes that it reads from and writes to the disk, by what they are.

Bytes are counted as the code moves them. Where memory is left, the system serves a part of the reads from its page cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from cbqstream.config import QuantizeConfig
from cbqstream.planning.closed_form import closed_form_passes
from cbqstream.planning.disk_rates import DiskRates
from cbqstream.planning.experts import (
    expert_blocks,
    expert_copies,
    expert_disk,
    expert_reads,
    expert_writes,
    packed_experts,
    stream_passes,
)
from cbqstream.planning.memory import (
    STREAMS_OF_WINDOW,
    packed_bytes,
    rounding_cost,
    state_bytes,
    stream_bytes,
    transform_cost,
)
from cbqstream.planning.sizes import ModelSizes
from cbqstream.planning.work import Extent, Work
from cbqstream.records import MemoryMode
from cbqstream.rounding.registry import method_of
from cbqstream.windows.schedule import split_held_out

_AHEAD = ("source", "streams")
"""Parts that are read ahead and written behind on threads, while the machine computes."""
_OFFLOADED = "offloaded layers"
_WAITED = (_OFFLOADED, "inputs of experts")
"""Parts whose copies to and from a CUDA device the computation waits for."""


@dataclass(frozen=True, slots=True)
class OffloadFile:
    """The file to which the layers of a window are offloaded, in bytes. The file never shrinks during a window."""

    size: int = 0
    """Largest size of the file."""
    read: int = 0
    """Number of bytes read during the run."""
    written: int = 0
    """Number of bytes written during the run."""

    @classmethod
    def of(cls, config: QuantizeConfig, sizes: ModelSizes, extent: Extent, work: Work) -> Self:
        """The file of a run.

        A training step reads every layer three times, because activations are computed again, and writes the values of the rounding.
        Other passes read every layer once per batch.

        Args:
            config: settings of the run.
            sizes: sizes of what the windows hold.
            extent: windows of the run.
            work: work of the run.
        """
        values = rounding_cost(config, sizes).offloaded_bytes
        each = sizes.weights * sizes.stored * (1 + transform_cost(config).copies) + values
        finished = sizes.weights + packed_bytes(config, sizes)  # the codes, and the packed tensors
        read = (3 * work.steps + work.hard_batches + work.stream_batches) * each
        written = work.steps * values + work.windows * extent.in_window * each + work.blocks * finished
        return cls(extent.in_window * (each + finished), int(read), int(written))


def disk_bytes(
    config: QuantizeConfig,
    sizes: ModelSizes,
    extent: Extent,
    memory_mode: MemoryMode,
    offloaded: OffloadFile,
    device: str,
) -> Mapping[str, int]:
    """Peak disk space without the source, in bytes by purpose.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        extent: windows of the run.
        memory_mode: memory mode of the run.
        offloaded: file of offloaded layers.
        device: `cpu` or `cuda`.
    """
    calibration, streams = config.calibration, STREAMS_OF_WINDOW - (0 if memory_mode.streams_on_disk else 1)
    learns, held = method_of(config.reconstruction).learns, sizes.in_windows(config)
    # the last epoch rewrites the shards of all blocks
    rewritten = 2 if learns and config.reconstruction.end_to_end_epochs else 1
    kept = (sizes.num_blocks - extent.quantized) * sizes.block_bytes
    return {
        "streams": streams * stream_bytes(config, sizes)
        + calibration.num_samples * calibration.seq_len * sizes.beside
        + 4 * calibration.num_samples * sizes.handed(calibration.seq_len),  # not beside the targets
        "blocks": _finished_bytes(config, sizes, extent) * rewritten,
        "window states": 2 * state_bytes(config, held, extent.staying),
        "rest of the model": sizes.outer_bytes + kept,
        "layers of a window": offloaded.size,
    } | expert_disk(config, sizes, extent, memory_mode)


def _finished_bytes(config: QuantizeConfig, sizes: ModelSizes, extent: Extent) -> int:
    """Size in bytes of the shards of all finished blocks."""
    held = extent.quantized * packed_bytes(config, sizes.in_windows(config))
    return held + expert_blocks(config, sizes, extent) * packed_experts(config, sizes)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a run moves between disk, memory and device."""

    read: Mapping[str, int]
    """Parts of the bytes read from disk, by purpose."""
    written: Mapping[str, int]
    """Parts of the bytes written to disk, by purpose."""
    bus: Mapping[str, int]
    """Parts of the bytes that are copied to and from a CUDA device, by purpose; empty on the CPU."""
    offload_file: int
    """Size of the file of offloaded layers."""

    @classmethod
    def of(
        cls,
        config: QuantizeConfig,
        sizes: ModelSizes,
        extent: Extent,
        work: Work,
        memory_mode: MemoryMode,
        offloaded: OffloadFile,
        device: str,
    ) -> Self:
        """The traffic of a run.

        Args:
            config: settings of the run.
            sizes: sizes of the model.
            extent: windows of the run.
            work: work of the windows.
            memory_mode: memory mode of the run.
            offloaded: file of offloaded layers.
            device: `cpu` or `cuda`.
        """
        settings, calibration, held = config.reconstruction, config.calibration, sizes.in_windows(config)
        stream, handed = stream_bytes(config, sizes), calibration.num_samples * sizes.handed(calibration.seq_len)
        training, held_out = (len(part) for part in split_held_out(calibration.num_samples))
        epochs, whole_model = (settings.epochs, settings.end_to_end_epochs) if method_of(settings).learns else (0, 0)
        passes = (epochs * training + 2 * held_out) / calibration.num_samples
        # passes over streams
        computed_with, computed = _passes(config, sizes, extent, passes), 3 * extent.windows
        on_disk = handed + (stream if memory_mode.streams_on_disk else 0)
        blocks = extent.windows * extent.in_window
        experts_read, experts_written = (
            expert_reads(config, sizes, extent, memory_mode, passes),
            expert_writes(config, sizes, extent, memory_mode),
        )
        source = blocks * held.block_read + sizes.ends_bytes + sizes.outer_read + experts_read.pop("source", 0)
        read = {
            "source": source,
            # those that stay in memory are read by the first window alone
            "streams": int(computed_with * on_disk) + (0 if memory_mode.streams_on_disk else 2 * stream),
            "finished blocks": whole_model * sizes.num_blocks * 4 * packed_bytes(config, sizes),
            _OFFLOADED: offloaded.read,
        }
        written = {
            "streams": extent.windows * ((3 if memory_mode.streams_on_disk else 2) * stream + 3 * handed),
            "window states": extent.windows * state_bytes(config, held, extent.staying),
            "blocks": _finished_bytes(config, sizes, extent) * (2 if whole_model else 1),
            "rest of the model": sizes.outer_bytes,
            _OFFLOADED: offloaded.written,
        }
        read, written = _merged(read, experts_read), _merged(written, experts_written)
        bus = {"inputs of experts": expert_copies(config, sizes, extent)}
        bus |= {"streams": int((computed_with + computed) * (stream + handed))}
        bus |= {_OFFLOADED: offloaded.read + offloaded.written}
        bus = _merged({"weights": source}, bus) if device == "cuda" else {}
        return cls(read, written, bus, offloaded.size)

    def seconds(self, rates: DiskRates, computing: float, spare: int) -> Mapping[str, float]:
        """Time in seconds that the traffic adds to the time of computing, by activity.

        The source and the streams are read ahead and written behind on threads, so only their time beyond that of computing counts.
        The computation waits for all other traffic. If the file of offloaded layers fits in the page cache, it is read from there.

        Args:
            rates: speed of the disks.
            computing: time of computing, in seconds.
            spare: memory that is left for the page cache, in bytes.
        """
        cached = self.offload_file <= spare
        reading = {part: size / (rates.source if part == "source" else rates.read) for part, size in self.read.items()}
        if cached and _OFFLOADED in reading:
            reading[_OFFLOADED] = self.read[_OFFLOADED] / rates.cached
        writing = {part: size / rates.write for part, size in self.written.items()}
        ahead = [sum(times.get(part, 0) for part in _AHEAD) for times in (reading, writing)]
        shown = max(0.0, sum(ahead) - computing) / (sum(ahead) or 1)
        read, written = (
            sum(times.values()) - hidden + shown * hidden
            for times, hidden in ((reading, ahead[0]), (writing, ahead[1]))
        )
        copied = sum(self.bus.get(part, 0) for part in _WAITED) / rates.bus if rates.bus else 0.0
        return {"reading": read, "writing": written} | ({"copying to the device": copied} if copied else {})


def _passes(config: QuantizeConfig, sizes: ModelSizes, extent: Extent, passes: float) -> float:
    """Number of times that a run reads a stream.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
        extent: windows of the run.
        passes: number of times that the steps of a window read a stream.
    """
    closed_form = method_of(config.reconstruction).closed_form
    of_window = 3 + 2 * passes + (closed_form_passes(sizes.in_windows(config)) if closed_form else 0)
    return of_window * extent.windows + stream_passes(config) * expert_blocks(config, sizes, extent)


def _merged(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    """Sums of two mappings, without parts that are zero."""
    sums = {part: first.get(part, 0) + second.get(part, 0) for part in {**first, **second}}
    return {part: size for part, size in sums.items() if size}
