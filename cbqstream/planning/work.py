"""The work of a run: the number of passes of segments through blocks, and the time that they take."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from cbqstream.config import QuantizeConfig
from cbqstream.planning.memory import WIDTH
from cbqstream.planning.rates import Rates
from cbqstream.planning.sizes import ModelSizes
from cbqstream.rounding.registry import method_of
from cbqstream.windows.schedule import schedule, split_held_out

START = 4.0
"""Seconds to import everything and to open the model."""
_LOGIT_PASSES = 6
"""Number of reads and writes of each logit in training."""
_STAGE_PASSES = 2.4
"""Number of passes of both streams through a block for the inputs of its stages, of a block of Llama; each ends at the inputs."""
_ROUTING_PASSES = 4
"""Number of passes of a stream through the other layers of a block, for the inputs and the residuals of experts that are trained alone."""
_GRID_SEARCH = {True: 22, False: 120}
"""Cost of the grid search of a weight on the CPU, in training steps of its rounding, by whether the scheme is symmetric."""
GRID_SEARCH_BYTES = {"auto": {True: 200, False: 700}, "plain": {True: 5300, False: 16900}}
"""Bytes that take the time of the grid search of a weight on CUDA, likewise. Plain kernels move them (benchmarks/trace_step.py). The Triton
kernel computes for that time, as measured on an H200 (tools/gpu_probe.py), and for less on devices with slower memory."""
_ELEMENTWISE = {None: 14, 8: 21, 4: 21}
"""Number of elementwise reads and writes of activations in training, for each output value of the layers, by `activation_bits`."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Numbers of windows and of blocks in a run."""

    windows: int
    """Number of windows."""
    in_window: int
    """Largest number of blocks in a window."""
    staying: int
    """Largest number of blocks that stay for the next window."""
    quantized: int
    """Number of blocks that are quantized."""

    @classmethod
    def of(cls, config: QuantizeConfig, num_blocks: int) -> Self:
        """The windows of a run.

        Args:
            config: settings of the run.
            num_blocks: number of blocks of the model.
        """
        windows = schedule(config.keep_first, num_blocks - config.keep_last, config.window)
        return cls(
            windows=len(windows),
            in_window=max(window.stop - window.start for window in windows),
            staying=max(window.stop - window.next_start for window in windows),
            quantized=windows[-1].stop - windows[0].start,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """Numbers of passes and training steps in a run."""

    forward: float
    """Number of forward passes of one segment through one block."""
    trained: float
    """Number of training passes of one segment through one block; each costs as much as three forward passes."""
    steps: float
    """Number of training steps of one block with one batch."""
    hard_batches: float
    """Number of passes of one batch through one block with hard weights."""
    stream_batches: float
    """Number of passes of one batch through one block that move a stream or compute targets."""
    windows: int
    """Number of windows."""
    blocks: float
    """Number of blocks whose layers get a grid."""
    head_segments: float
    """Number of segments whose next-token distribution is computed."""

    @property
    def passes(self) -> float:
        """Number of passes of one segment through one block, in units of forward passes."""
        return self.forward + 3 * self.trained

    @classmethod
    def of(cls, config: QuantizeConfig, sizes: ModelSizes, extent: Extent, *, activation_checkpointing: bool) -> Self:
        """The work of the windows and of the end-to-end stage.

        Args:
            config: settings of the run.
            sizes: sizes of the model.
            extent: windows of the run.
            activation_checkpointing: whether the memory mode computes activations again in the backward pass.
        """
        settings, samples = config.reconstruction, config.calibration.num_samples
        windows, in_window = extent.windows, extent.in_window
        training, held_out = (len(part) for part in split_held_out(samples))
        learns = method_of(settings).learns
        epochs = settings.epochs if learns else 0
        other_passes = _STAGE_PASSES if method_of(settings).closed_form else 0
        if settings.experts == "alone":
            other_passes += _ROUTING_PASSES + method_of(settings).closed_form
        stride = config.window.size - config.window.overlap
        forward: float = windows * (samples * (stride + in_window + stride) + 2 * held_out * in_window)
        trained = windows * epochs * training * in_window
        steps = windows * epochs * math.ceil(training / settings.batch_size)
        if activation_checkpointing:
            forward += trained
        forward += windows * samples * other_passes
        if settings.end_to_end_epochs and learns:
            forward += settings.end_to_end_epochs * sizes.num_blocks * (training + 2 * held_out)
            trained += settings.end_to_end_epochs * sizes.num_blocks * training
        return cls(
            forward=forward,
            trained=trained,
            steps=steps * in_window,
            hard_batches=2 * windows * in_window * math.ceil(held_out / settings.batch_size),
            stream_batches=windows * (2 * stride + in_window + other_passes) * math.ceil(samples / settings.batch_size),
            windows=windows,
            blocks=windows * stride,
            head_segments=epochs * training + 2 * held_out if settings.head_weight else 0,
        )


def attention_weights(config: QuantizeConfig, sizes: ModelSizes) -> int:
    """Number of multiplications of attention for each token of a segment of length S, with on average S/2 keys and S/2 values."""
    return config.calibration.seq_len * sizes.hidden


def seconds_of(
    config: QuantizeConfig, sizes: ModelSizes, work: Work, rates: Rates, attention: int, device: str
) -> Mapping[str, float]:
    """Time of computing in seconds, by kind of work.

    Args:
        config: settings of the run.
        sizes: sizes of the layers that compute.
        work: work of the run.
        rates: rates of the machine.
        attention: number of multiplications of attention for each token.
        device: `cpu` or `cuda`.
    """
    seq_len = config.calibration.seq_len
    passes = work.trained + work.forward / 3
    products = passes * seq_len * (sizes.active + 2 * attention)
    grids, searched = 1, 0.0
    if config.reconstruction.init == "search" and device == "cpu":
        grids = _GRID_SEARCH[config.scheme.symmetric]
    elif config.reconstruction.init == "search":
        moved = GRID_SEARCH_BYTES[config.reconstruction.kernels][config.scheme.symmetric] * work.blocks * sizes.weights
        grids, searched = 0, moved * rates.value / WIDTH[device]
    weights = (work.steps + work.hard_batches + grids * work.blocks) * sizes.weights
    values = passes * seq_len * _ELEMENTWISE[config.scheme.activation_bits] * sizes.outputs
    seen = work.head_segments * seq_len / config.reconstruction.head_stride
    products += seen * sizes.vocabulary * sizes.hidden
    values += seen * sizes.vocabulary * _LOGIT_PASSES
    return {
        "matrix products": products * rates.product,
        "rounding": weights * rates.weight + searched,
        "other elementwise work": values * rates.value,
    }
