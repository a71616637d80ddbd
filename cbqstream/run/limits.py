"""Limits of the machine: room on disk and memory, checked and explained in one line."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cbqstream.config import QuantizeConfig
from cbqstream.disk import free_bytes
from cbqstream.errors import DeviceMemoryError, StorageError, shown
from cbqstream.planning.plan import CONTEXT
from cbqstream.records import BlockSpec, EpochReport, RunWarning, WindowReport
from cbqstream.run.inputs import RunInputs
from cbqstream.runtime.memory import GIB, is_out_of_memory

_BYTES_PER_VALUE = 2
"""Size of a value of a stream; an upper bound for a weight in a shard, or in the window state."""
_OFFLOADED_BYTES = 8
"""Upper bound for an offloaded weight: itself, its rounding value, and its code, alone and packed."""
_MARGIN = 1.05


def disk_bytes(inputs: RunInputs, *, streams: int, blocks: Sequence[BlockSpec] = (), in_a_window: bool = False) -> int:
    """Upper bound of the disk space of streams, and of the shards and window state of blocks.

    Args:
        inputs: inputs of the run.
        streams: number of streams.
        blocks: blocks whose shards or state are written.
        in_a_window: whether the layers of the blocks may be offloaded.
    """
    weights = sum(math.prod(inputs.source.infos[name].shape) for block in blocks for name in block.tensors.values())
    a_weight = _BYTES_PER_VALUE + (_OFFLOADED_BYTES if in_a_window and inputs.compute.memory_mode.offload else 0)
    return int(_MARGIN * (_BYTES_PER_VALUE * streams * math.prod(inputs.stream_shape) + a_weight * weights))


@contextmanager
def room_for(what: str, needed: int, folder: Path) -> Iterator[None]:
    """Start something only if there is disk space for it, and say what it needs if space or memory runs out.

    Args:
        what: what is being done.
        needed: bytes of disk that it needs besides what is there.
        folder: where they are needed.

    Raises:
        StorageError: there is not enough disk space.
        DeviceMemoryError: there is not enough memory.
    """
    free = free_bytes(folder)
    if needed > free:
        numbers = f"{what} needs {needed / GIB:.3f} GiB of disk, {free / GIB:.3f} are free"
        raise StorageError(f"{folder}: {numbers}. Free some space and run the same command again.")
    try:
        yield
    except StorageError as error:
        if not error.full:
            raise
        raise StorageError(f"{error} {what} needs {needed / GIB:.3f} GiB of disk.", full=True) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = shown(str(error).partition("\n")[0]) or "out of memory"
        remedy = "Run the same command with --max-vram or --max-ram below what there is, or a new run with a smaller --batch-size."
        raise DeviceMemoryError(f"{what} needs more memory than there is ({said}). {remedy}") from error


def over_limit(config: QuantizeConfig, report: WindowReport | EpochReport) -> list[RunWarning]:
    """Warnings of a window, or an epoch, that took more memory than the plan, and with it the user, allowed."""
    costs = report.costs
    if costs is None:
        return []
    return [
        RunWarning(f"{what}: {taken / GIB:.2f} GiB were taken, {flag} is {limit / GIB:.2f}; the plan was too low.")
        for what, flag, limit, taken in (
            ("memory", "--max-ram", config.max_ram, costs.peak_rss),
            ("device memory", "--max-vram", config.max_vram, costs.peak_vram and costs.peak_vram + CONTEXT),
        )
        if limit is not None and taken > limit
    ]
