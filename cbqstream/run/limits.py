"""Where a machine is too small, or training fails, in words: room on disk, device memory, and windows that do not converge."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cbqstream.config import QuantizeConfig
from cbqstream.disk import free_bytes
from cbqstream.errors import DeviceMemoryError, InputError, StorageError, shown
from cbqstream.models.experts import tokens_by_expert
from cbqstream.models.families import EXPERT
from cbqstream.planning.plan import CONTEXT
from cbqstream.records import BlockSpec, EpochReport, RunWarning, WindowReport
from cbqstream.run.inputs import RunInputs
from cbqstream.rundir.chain import Chain
from cbqstream.runtime.memory import GIB, is_out_of_memory
from cbqstream.windows.resident import ResidentBlock
from cbqstream.windows.schedule import split_held_out

_BYTES_A_VALUE = 2
"""Of a stream; and, from above, of a weight in a shard or in what is carried over."""
_OFFLOADED_BYTES = 8
"""From above, of a weight that lies on disk while it is not used: itself, its rounding value, its code, alone and packed."""
_MARGIN = 1.05
_REVERTED = 0.1
_SMALLEST_MOVE = 1e-4
"""Of a rounding value, in the mean of the steps. With 0.25 in 2,688 steps they move 1 % less than they should in a first window and 5 %
in a second; in 4,480 steps a quarter and a half."""
_NAMED = 8
"""Experts, of those that have something to say in common."""


def disk_bytes(inputs: RunInputs, *, streams: int, blocks: Sequence[BlockSpec] = (), in_a_window: bool = False) -> int:
    """What so many streams, and the shards and roundings of some blocks, take on disk, from above; in a window perhaps their layers too."""
    weights = sum(math.prod(inputs.source.infos[name].shape) for block in blocks for name in block.tensors.values())
    a_weight = _BYTES_A_VALUE + (_OFFLOADED_BYTES if in_a_window and inputs.compute.memory_mode.offload else 0)
    return int(_MARGIN * (_BYTES_A_VALUE * streams * math.prod(inputs.stream_shape) + a_weight * weights))


@contextmanager
def room_for(what: str, needed: int, folder: Path) -> Iterator[None]:
    """Begin something only where there is room for it, and say what it needs where something runs out on the way.

    Args:
        what: is being done.
        needed: bytes of disk for that, besides what lies there.
        folder: where.

    Raises:
        StorageError: there is not enough disk.
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
    """Says so where a window, or an epoch, took more memory than the plan, and with it the user, allowed."""
    return [
        RunWarning(f"{what}: {taken / GIB:.2f} GiB were taken, {flag} is {limit / GIB:.2f}; the plan was too low.")
        for what, flag, limit, taken in (
            ("memory", "--max-ram", config.max_ram, report.peak_rss),
            ("device memory", "--max-vram", config.max_vram, report.peak_vram and report.peak_vram + CONTEXT),
        )
        if limit is not None and taken > limit
    ]


def require_finite_windows(chain: Chain) -> None:
    """Refuse to go on when training fails again and again: the result would be rounded to nearest, and nobody would know.

    Raises:
        InputError: in more than a tenth of the windows, and in more than one, the loss became NaN or infinite.
    """
    fallen = [index for index, commit in enumerate(chain.commits) if commit["report"].get("reverted") == "not finite"]
    if len(fallen) > max(1, _REVERTED * chain.num_windows):
        raise InputError(
            chain.path,
            f"in {len(fallen)} windows the loss was not finite, first in window {fallen[0] + 1}."
            " Use a smaller --max-shift or --scale-lr in a new run.",
        )


def model_warnings(inputs: RunInputs) -> Iterator[RunWarning]:
    """What is unusual about the model of a run."""
    kind, path = inputs.meta_model.config.model_type, inputs.meta_model.blocks_path
    if not inputs.meta_model.is_tested:
        yield RunWarning(
            f'{inputs.config.model}: architecture "{kind}" is untested here; its blocks were found at "{path}".'
        )
    quantized = {_has_experts(layers) for layers in _layers_of_expert_blocks(inputs)}
    if len(quantized) > 1:
        yield RunWarning(
            "the experts of some blocks are quantized and those of others are not, which transformers 5.24 does not load."
            " Leave out --keep-first and --keep-last, or use another program."
        )
    settings, (training, held_out) = inputs.config.reconstruction, split_held_out(len(inputs.tokens))
    if training == held_out and settings.rounding != "nearest":
        yield RunWarning(
            f"of {len(held_out)} segments none can be held out: windows are judged by what they learn from. Use --num-samples 8 or more."
        )
    steps = settings.epochs * math.ceil(len(training) / settings.batch_size)
    if settings.rounding == "signround" and settings.max_shift < _SMALLEST_MOVE * steps:
        yield RunWarning(
            f"{steps:,} steps a window: rounding values have 16 bits and do not move by so little. Use a larger --batch-size."
        )
    if inputs.model.get("auto_map"):
        yield RunWarning(f"{inputs.config.model}: brings its own code (auto_map), which is not run.")


def _layers_of_expert_blocks(inputs: RunInputs) -> Iterator[Sequence[str]]:
    """The layers that are quantized, of each block that has experts."""
    first, stop = inputs.config.keep_first, len(inputs.meta_model.blocks) - inputs.config.keep_last
    for spec in inputs.meta_model.blocks:
        if _has_experts(spec.linears):
            yield list(inputs.layers(spec.index)) if first <= spec.index < stop else []


def _has_experts(layers: Iterable[str]) -> bool:
    return any(EXPERT.search(name) for name in layers)


def undersampled_experts(prefix: str, block: ResidentBlock) -> RunWarning:
    """Names the experts of a block that saw too few tokens to learn from."""
    counts = [count for path in tokens_by_expert(block.tokens).values() for count in path]
    names = sorted({name.rpartition(".")[0] for name in block.undersampled})
    shown_names = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    return RunWarning(
        f"{prefix}: its {len(counts)} experts saw {min(counts):,} to {max(counts):,} tokens; rounded to nearest: {shown_names}."
        " More --num-samples reach more of them."
    )
