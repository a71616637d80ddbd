"""Immutable values that the stages hand to each other. Tensor shapes use the letters of `numerics/affine.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # so that what only passes records on starts without torch
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from cbqstream.config import Scheme


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in a checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    """First byte in the file."""
    end: int
    """Byte after the last."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return self.end - self.start


class WeightSource(Protocol):
    """Something that gives the dense tensors of a model by name: a checkpoint, or a quantized one that is dequantized on reading."""

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every dense tensor by its name in the original checkpoint."""
        ...

    def read(self, name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on `device`, in `dtype` or as it is stored."""
        ...

    def input_quantizer(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """What the linear layer with weight `name` does to its input first, or None."""
        ...


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One transformer block of a model, by name."""

    index: int
    prefix: str
    """Module path in the model, such as `model.layers.3`."""
    tensors: Mapping[str, str]
    """Name in the checkpoint of each parameter, by its name within the block."""
    linears: tuple[str, ...]
    """Names within the block of the linear layers, in module order."""

    def stored(self, layer: str) -> str:
        """Path in the checkpoint of one of them."""
        return self.tensors[f"{layer}.weight"].removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks `start` to `stop - 1`, optimized together."""

    index: int
    start: int
    stop: int
    frontier: int
    """First block that no earlier window held; the reference stream waits at this boundary."""
    next_start: int
    """First block of the next window; the blocks before it leave with this one. `stop` for the last window."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A hard quantized weight: what is evaluated is what is exported."""

    codes: Tensor
    """q_OI, int8."""
    scale: Tensor
    """s_OG, float32 holding bf16 values that are at least 2**-17."""
    zero_point: Tensor | None
    """z_OG, int8; None if symmetric."""
    scheme: Scheme
    input_scale: Tensor | None = None
    """Step size of the layer's inputs, a storable scale [1], where the scheme has one for the tensor."""

    def rows(self, rows: slice) -> QuantizedWeight:
        """Some rows of it."""
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return QuantizedWeight(self.codes[rows], self.scale[rows], zero_point, self.scheme, self.input_scale)


@dataclass(frozen=True, slots=True)
class MemoryMode:
    """What takes less memory and more time, and gives the same bits."""

    activation_checkpointing: bool = False
    """In training, keep the activations of one block and compute those of the others again."""
    offload: bool = False
    """Keep one layer of a window in memory, and the others on disk."""


@dataclass(frozen=True, slots=True)
class Compute:
    """Where blocks run, in which dtype, and how many segments at once."""

    device: torch.device
    dtype: torch.dtype
    batch_size: int
    memory_mode: MemoryMode = MemoryMode()


@dataclass(frozen=True, slots=True)
class EpochReport:
    """What happened in an epoch of learning end to end."""

    epoch: int
    num_epochs: int
    loss_before: float
    """Divergence of the predictions from the original model's on the held_out segments, with the step sizes as they would be stored."""
    loss_after: float
    """The same after the epoch; never above `loss_before`."""
    seconds: float
    peak_rss: int
    """Highest resident memory of the process so far, bytes."""
    peak_vram: int = 0
    """Highest memory that tensors had on the CUDA device in the epoch, bytes; 0 on the CPU."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a commit or a log."""
        return ({"peak_vram": self.peak_vram} if self.peak_vram else {}) | {
            "epoch": self.epoch,
            "epochs": self.num_epochs,
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "seconds": self.seconds,
            "peak_rss": self.peak_rss,
        }


@dataclass(frozen=True, slots=True)
class RunWarning:
    """Something about the inputs that a user should know, and that stops nothing."""

    text: str


@dataclass(frozen=True, slots=True)
class WindowReport:
    """What happened in a window."""

    window: Window
    num_windows: int
    loss_before: float
    """Loss of the hard window on the held_out segments before training."""
    loss_after: float
    """The same after training; never above `loss_before`."""
    reverted: str | None
    """Why what was learned was reverted, if it was: `held-out loss increased`, or `not finite`."""
    changed: float
    """Share of codes that differ from rounding the weights to nearest with the same scales."""
    seconds: float
    reading: float
    """Of those, how many were spent on waiting for weights and activations."""
    writing: float
    """And for the disk to take what was written."""
    peak_rss: int
    """Highest resident memory of the process so far, bytes."""
    experts: Mapping[str, list[int]]
    """How many calibration tokens each expert of a new block saw, by the path of the experts' module."""
    sqnr_db: Mapping[str, float]
    """Signal to noise of the weights of the blocks that leave, decibels, by the path of the layer."""
    scales: Mapping[str, tuple[int, float]]
    """How many channels of a new block were rescaled for their outliers, and the largest scale, by the path of what writes them."""
    undersampled: Sequence[str] = ()
    """Layers of a new block, by path, that saw too few tokens to learn from."""
    peak_vram: int = 0
    """Highest memory that tensors had on the CUDA device in the window, bytes; 0 on the CPU."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a commit or a log."""
        seldom = {
            "experts": dict(self.experts),
            "scales": {path: list(found) for path, found in self.scales.items()},
            "undersampled": list(self.undersampled),
            "peak_vram": self.peak_vram,
        }
        return {key: value for key, value in seldom.items() if value} | {
            "window": self.window.index,
            "windows": self.num_windows,
            "blocks": [self.window.start, self.window.stop],
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "reverted": self.reverted,
            "changed": self.changed,
            "sqnr_db": dict(self.sqnr_db),
            "seconds": self.seconds,
            "reading": self.reading,
            "writing": self.writing,
            "peak_rss": self.peak_rss,
        }
