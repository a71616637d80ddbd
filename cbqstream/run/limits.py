"""Where a machine is too small, or training fails, in words: room on disk, device memory, and windows that do not converge."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cbqstream.disk import free_bytes
from cbqstream.errors import DeviceMemoryError, InputError, StorageError, shown
from cbqstream.memory import GIB
from cbqstream.records import Window
from cbqstream.run.chain import Chain
from cbqstream.run.inputs import RunInputs

_STREAMS = 3
"""The reference and the quantized stream after the window, and the targets."""
_BYTES_A_VALUE = 2
"""Of a stream; and, from above, of a weight in a shard or in what is carried over."""
_MARGIN = 1.05
_FALLBACKS = 0.1


def window_bytes(inputs: RunInputs, window: Window, *, and_its_streams: bool = False) -> int:
    """What is written for a window, from above; and for the two streams that it reads, where they are not there yet.

    Not counted is what the windows before have left.
    """
    streams = _STREAMS + 2 * and_its_streams
    blocks = inputs.skeleton.blocks[window.start : window.stop]
    weights = sum(math.prod(inputs.source.infos[name].shape) for block in blocks for name in block.tensors.values())
    return int(_MARGIN * _BYTES_A_VALUE * (streams * math.prod(inputs.stream_shape) + weights))


def require_space(inputs: RunInputs, window: Window, folder: Path, *, and_its_streams: bool = False) -> None:
    """Refuse to begin a window that the file system of `folder` has no room for.

    Raises:
        StorageError: with what is missing.
    """
    needed, free = window_bytes(inputs, window, and_its_streams=and_its_streams), free_bytes(folder)
    if needed > free:
        raise StorageError(
            f"{folder}: window {window.index + 1} needs {needed / GIB:.3f} GiB of disk, {free / GIB:.3f} are free."
            " Free some space and run the same command again."
        )


def require_finite_windows(chain: Chain) -> None:
    """Refuse to go on when training fails again and again: the result would be rounded to nearest, and nobody would know.

    Raises:
        InputError: in more than a tenth of the windows, and in more than one, the loss became NaN or infinite.
    """
    fallen = [index for index, commit in enumerate(chain.commits) if commit["report"].get("fallback") == "not finite"]
    if len(fallen) > max(1, _FALLBACKS * chain.num_windows):
        raise InputError(
            chain.path,
            f"in {len(fallen)} windows the loss was not finite, first in window {fallen[0] + 1}."
            " Use a smaller --rounding-travel or --scale-lr in a new run.",
        )


@contextmanager
def explained(inputs: RunInputs, window: Window) -> Iterator[None]:
    """Say what a window needs where something runs out.

    Raises:
        DeviceMemoryError: memory did.
        StorageError: the disk did.
    """
    try:
        yield
    except StorageError as error:
        if not error.full:
            raise
        needed = f"Window {window.index + 1} needs {window_bytes(inputs, window) / GIB:.3f} GiB of disk."
        raise StorageError(f"{error} {needed}", full=True) from error
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        said = shown(str(error).partition("\n")[0]) or "out of memory"
        remedy = "Use a smaller --batch-size or --window-size in a new run."
        raise DeviceMemoryError(
            f"window {window.index + 1} needs more memory than there is ({said}). {remedy}"
        ) from error
