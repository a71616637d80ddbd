"""The work of a run: how often segments pass blocks, and how long that takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from cbqstream.config import QuantizeConfig
from cbqstream.planning.rates import Rates
from cbqstream.planning.sizes import ModelSizes
from cbqstream.rounding.registry import method_of
from cbqstream.windows.schedule import split_held_out

_START = 4.0
"""Seconds to import everything and to open the model."""
_LOGIT_COPIES = 6
_GRID_SEARCH = {True: 22, False: 120}
"""Cost of the grid search of a symmetric and of an asymmetric weight, in training steps of its rounding."""
_ELEMENTWISE = {None: 14, 8: 21, 4: 21}
"""Values of activations that are read or written elementwise in training, per value of the layers' outputs, by the width of inputs."""


@dataclass(frozen=True, slots=True)
class Work:
    """How often a segment passes a block, and how many steps there are."""

    forward: float
    """Forward passes of a segment through a block."""
    trained: float
    """Training steps of a segment in a block; each is three forward passes."""
    steps: float
    """Training steps of a block with a batch."""
    hard_batches: float
    """Batches that pass a block with hard weights."""
    stream_batches: float
    """Batches that pass a block to move a stream or to make targets."""
    windows: int
    blocks: float
    """Blocks that get a grid."""
    head_segments: float
    """Segments whose next-token distribution is computed."""

    @property
    def passes(self) -> float:
        """All passes of a segment through a block, as forward passes."""
        return self.forward + 3 * self.trained

    @classmethod
    def of(
        cls, config: QuantizeConfig, sizes: ModelSizes, windows: int, in_window: int, *, activation_checkpointing: bool
    ) -> Self:
        """The work of a run with so many windows of so many blocks."""
        settings, samples = config.reconstruction, config.calibration.num_samples
        training, held_out = (len(part) for part in split_held_out(samples))
        learns = method_of(settings).learns
        epochs = settings.epochs if learns else 0
        stride = config.window.size - config.window.overlap
        forward = windows * (samples * (stride + in_window + stride) + 2 * held_out * in_window)
        trained = windows * epochs * training * in_window
        steps = windows * epochs * math.ceil(training / settings.batch_size)
        if activation_checkpointing:
            forward += trained
        if settings.end_to_end_epochs and learns:
            forward += settings.end_to_end_epochs * sizes.num_blocks * (training + 2 * held_out)
            trained += settings.end_to_end_epochs * sizes.num_blocks * training
        return cls(
            forward=forward,
            trained=trained,
            steps=steps * in_window,
            hard_batches=2 * windows * in_window * math.ceil(held_out / settings.batch_size),
            stream_batches=windows * (2 * stride + in_window) * math.ceil(samples / settings.batch_size),
            windows=windows,
            blocks=windows * stride,
            head_segments=epochs * training + 2 * held_out if settings.head_weight else 0,
        )


def attention_weights(config: QuantizeConfig, sizes: ModelSizes) -> int:
    """Multiplications of attention for a token, in weights: half of S keys and half of S values."""
    return config.calibration.seq_len * sizes.hidden


def seconds_of(config: QuantizeConfig, sizes: ModelSizes, work: Work, rates: Rates) -> Mapping[str, float]:
    """Time of a run in seconds, by what it goes to."""
    seq_len = config.calibration.seq_len
    passes = work.trained + work.forward / 3
    products = passes * seq_len * (sizes.active + 2 * attention_weights(config, sizes))
    grids = _GRID_SEARCH[config.scheme.symmetric] if config.reconstruction.init == "search" else 1
    weights = (work.steps + work.hard_batches + grids * work.blocks) * sizes.weights
    values = passes * seq_len * _ELEMENTWISE[config.scheme.activation_bits] * sizes.outputs
    seen = work.head_segments * seq_len / config.reconstruction.head_stride
    products += seen * sizes.vocabulary * sizes.hidden
    values += seen * sizes.vocabulary * _LOGIT_COPIES
    return {
        "matrix products": products * rates.product,
        "rounding": weights * rates.weight,
        "other elementwise work": values * rates.value,
        "starting": _START,
    }
