"""Limits of disk space and memory: checks, and errors and warnings that state the required size."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cbqstream.config import QuantizeConfig
from cbqstream.disk import free_bytes
from cbqstream.errors import DeviceMemoryError, StorageError, shown
from cbqstream.planning.experts import STORES_IN_FILE
from cbqstream.planning.memory import CONTEXT
from cbqstream.records import BlockSpec, EpochReport, RunWarning, WindowReport
from cbqstream.run.inputs import RunInputs
from cbqstream.rundir.chain import Chain
from cbqstream.rundir.partial import PARTIAL
from cbqstream.runtime.memory import GIB, is_out_of_memory

_BYTES_PER_VALUE = 2
"""Size of a value of a stream in bytes; an upper bound of the size of a weight in a shard or in the window state."""
_OFFLOADED_BYTES = 8
"""Upper bound of the size of an offloaded weight in bytes: the weight, its rounding value, its code, and its packed code."""
_FINISHED_BYTES = 2
"""Upper bound of the size of a weight of a finished expert, which is durable before the shard of its block is written."""
_MARGIN = 1.05
"""Safety factor of the disk space."""


def disk_bytes(
    inputs: RunInputs,
    *,
    streams: int,
    blocks: Sequence[BlockSpec] = (),
    in_a_window: bool = False,
    beside: bool = False,
) -> int:
    """Upper bound of the disk space of streams and of the shards and window state of blocks, in bytes.

    Args:
        inputs: inputs of the run.
        streams: number of streams.
        blocks: blocks whose shards or window state are written.
        in_a_window: whether the blocks are in a window, whose layers are offloaded if the memory mode is to offload.
        beside: whether the arguments of blocks that depend on the tokens are stored too.
    """
    offload = in_a_window and inputs.compute.memory_mode.offload
    alone = {name for block in blocks for name in inputs.weights_alone(block.index)} if in_a_window else set()
    sizes = {name: math.prod(inputs.source.infos[name].shape) for block in blocks for name in block.tensors.values()}
    of_experts = sum(size for name, size in sizes.items() if name in alone)
    weights = sum(sizes.values()) * _BYTES_PER_VALUE + of_experts * _FINISHED_BYTES
    weights += (sum(sizes.values()) - of_experts) * _OFFLOADED_BYTES if offload else 0
    streams += STORES_IN_FILE if alone and inputs.compute.memory_mode.expert_inputs_on_disk else 0
    values = inputs.tokens.numel() * inputs.meta_model.handover.token_bytes if beside else 0
    handed = len(inputs.tokens) * inputs.meta_model.handover.bytes_of_segment(inputs.tokens.shape[1])
    stream = _BYTES_PER_VALUE * math.prod(inputs.stream_shape) + handed
    partial = inputs.config.run_path / PARTIAL
    there = sum(path.stat().st_size for path in partial.iterdir()) if in_a_window and partial.exists() else 0
    return max(0, int(_MARGIN * (streams * stream + weights + values)) - there)


@contextmanager
def room_for(what: str, needed: int, folder: Path) -> Iterator[None]:
    """Check that there is enough disk space for the body of a `with`, and explain errors of the body about disk space or memory.

    Args:
        what: name of the step, for messages.
        needed: additional disk space that the step needs, in bytes.
        folder: folder in which the disk space is needed.

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
        reason = shown(str(error).partition("\n")[0]) or "out of memory"
        remedy = "Run the same command with --max-vram or --max-ram below the available memory, or a new run with a smaller --batch-size."
        raise DeviceMemoryError(f"{what} needs more memory than is available ({reason}). {remedy}") from error


def over_limit(config: QuantizeConfig, report: WindowReport | EpochReport) -> list[RunWarning]:
    """Warnings about a window or an epoch that used more memory than the limits of the settings, which the plan should have prevented."""
    costs = report.costs
    if costs is None:
        return []
    return [
        RunWarning(f"{label}: {used / GIB:.2f} GiB were used, but {flag} is {limit / GIB:.2f}; the plan was too low.")
        for label, flag, limit, used in (
            ("memory", "--max-ram", config.max_ram, costs.peak_rss),
            ("device memory", "--max-vram", config.max_vram, costs.peak_vram and costs.peak_vram + CONTEXT),
        )
        if limit is not None and used > limit
    ]


def missing_streams(chain: Chain) -> int:
    """Number of streams for which recomputing those of the next window needs space; 0 if they exist or are not needed.

    Each of the two streams is read from one store and written to another.
    """
    return 0 if chain.is_complete or chain.acts(chain.next_window).exists() else 4
