"""Immutable values that the stages hand to each other. Tensor shapes use the letters of `numerics/affine.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # so that modules which only pass records on start without torch
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from cbqstream.scheme import Scheme


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """Names of the parts of one transformer block."""

    index: int
    prefix: str
    """Module path in the model, such as `model.layers.3`."""
    tensors: Mapping[str, str]
    """Name in the checkpoint of each parameter, by its name in the block."""
    linears: tuple[str, ...]
    """Names in the block of its linear layers, in module order."""

    def stored(self, layer: str) -> str:
        """Path in the checkpoint of a linear layer of the block."""
        return self.tensors[f"{layer}.weight"].removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks `start` to `stop - 1`, optimized together."""

    index: int
    start: int
    stop: int
    frontier: int
    """First block that no earlier window held; the reference stream is at this boundary."""
    next_start: int
    """First block of the next window; the blocks before it leave with this window. `stop` for the last window."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A hard quantized weight: it is evaluated and exported as it is."""

    codes: Tensor
    """q_OI, int8."""
    scale: Tensor
    """s_OG, float32 holding bf16 values that are at least 2**-17."""
    zero_point: Tensor | None
    """z_OG, int8; None if symmetric."""
    scheme: Scheme
    input_scale: Tensor | None = None
    """Step size of the layer's inputs, a storable scale [1], if the scheme has one per tensor."""

    def rows(self, rows: slice) -> QuantizedWeight:
        """Some rows of the weight."""
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return QuantizedWeight(self.codes[rows], self.scale[rows], zero_point, self.scheme, self.input_scale)


@dataclass(frozen=True, slots=True)
class MemoryMode:
    """Measures that save memory. They take time and change no bit of the result."""

    activation_checkpointing: bool = False
    """Keep the activations of one block in training, and compute those of the others again."""
    offload: bool = False
    """Keep one layer of a window in memory, and the others on disk."""
    expert_inputs_on_disk: bool = False
    """Keep the inputs and the residuals of the experts that are trained alone in a file."""
    streams_on_disk: bool = False
    """Read the streams from disk, where they always are, in every pass over them. Otherwise they stay in memory too."""


@dataclass(frozen=True, slots=True)
class Compute:
    """Device and dtype in which blocks run, and segments in a batch."""

    device: torch.device
    dtype: torch.dtype
    batch_size: int
    memory_mode: MemoryMode = MemoryMode()


@dataclass(frozen=True, slots=True)
class Numerics:
    """Everything besides inputs and settings that must be equal for results to be equal bit for bit."""

    device: str
    device_name: str
    cpu_capability: str
    threads: int
    torch: str
    transformers: str
    cuda: str | None = None
    """Versions of the libraries of a CUDA device; None on the CPU."""
    cudnn: int | None = None
    triton: str | None = None

    def changes_to(self, other: Numerics) -> str:
        """The fields that differ in `other`, as `name before -> after`."""
        before, after = asdict(self), asdict(other)
        return ", ".join(f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after[name])


@dataclass(frozen=True, slots=True)
class RunWarning:
    """A fact about the inputs that the user should know, and that stops nothing."""

    text: str


@dataclass(frozen=True, slots=True)
class RunNotice:
    """A fact about the result that the user should know."""

    text: str


@dataclass(frozen=True, slots=True)
class Costs:
    """Time and memory of a window or an epoch on this machine."""

    seconds: float
    peak_rss: int
    """Highest resident memory of the process so far, bytes."""
    reading: float = 0.0
    """Seconds spent waiting for weights and activations."""
    writing: float = 0.0
    """Seconds spent waiting for the disk to take what is written."""
    peak_vram: int = 0
    """Highest memory of tensors on the CUDA device, bytes; 0 on the CPU."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`.

        Raises:
            ValueError: a field is missing or unknown, or is not a number.
        """
        try:
            costs = cls(**values)
        except TypeError as error:
            raise ValueError(f"not the costs of a window: {error}") from error
        _require_numbers(asdict(costs).values())
        return costs


@dataclass(frozen=True, slots=True)
class EpochReport:
    """Result of an epoch of the end-to-end stage."""

    epoch: int
    num_epochs: int
    loss_before: float
    """Divergence of the predictions from those of the original model on the held-out segments, with the scales as they would be stored."""
    loss_after: float
    """Divergence after the epoch; never above `loss_before`."""
    costs: Costs | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a commit or a log."""
        values = {
            "epoch": self.epoch,
            "epochs": self.num_epochs,
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
        }
        return values if self.costs is None else {**values, "costs": asdict(self.costs)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, or has another type.
        """
        numbers = [_value(values, name) for name in ("epoch", "epochs", "loss_before", "loss_after")]
        _require_numbers(numbers)
        epoch, num_epochs, before, after = numbers
        return cls(epoch, num_epochs, before, after, _costs(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowReport:
    """Result of a window."""

    index: int
    num_windows: int
    start: int
    """First block."""
    stop: int
    """Block after the last."""
    loss_before: float
    """Loss of the hard window on the held-out segments before training."""
    loss_after: float
    """Loss after training; never above `loss_before`."""
    reverted: str | None
    """Why the training was reverted: `held-out loss increased` or `not finite`; None if it was kept."""
    changed: float
    """Share of codes that differ from rounding the weights to nearest with the same scales."""
    sqnr_db: Mapping[str, float]
    """Signal to quantization noise of the weights of the blocks that leave, decibels, by the path of the layer."""
    experts: Mapping[str, Sequence[int]]
    """Number of calibration tokens of each expert of a new block, by the path of the experts' module."""
    smoothed: Mapping[str, tuple[int, float]]
    """Number of rescaled channels of each smoothed layer of a new block, and the largest scale, by the path of the layer."""
    undersampled: Sequence[str] = ()
    """Paths of the layers of a new block that saw too few tokens to learn from."""
    costs: Costs | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a commit or a log."""
        seldom = {
            "experts": {path: list(counts) for path, counts in self.experts.items()},
            "smoothed": {path: list(found) for path, found in self.smoothed.items()},
            "undersampled": list(self.undersampled),
            "costs": {} if self.costs is None else asdict(self.costs),
        }
        return {key: value for key, value in seldom.items() if value} | {
            "window": self.index,
            "windows": self.num_windows,
            "blocks": [self.start, self.stop],
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "reverted": self.reverted,
            "changed": self.changed,
            "sqnr_db": dict(self.sqnr_db),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, or has another type.
        """
        try:
            start, stop = values["blocks"]
            smoothed = {path: (count, largest) for path, (count, largest) in values.get("smoothed", {}).items()}
            experts = {path: tuple(counts) for path, counts in values.get("experts", {}).items()}
            decibels, undersampled = dict(values["sqnr_db"]), tuple(values.get("undersampled", ()))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the report of a window: {error}") from error
        scalars = [_value(values, name) for name in ("window", "windows", "loss_before", "loss_after", "changed")]
        _require_numbers([*scalars, start, stop, *decibels.values()])
        _require_numbers(number for found in (*smoothed.values(), *experts.values()) for number in found)
        reverted = _value(values, "reverted")
        if not all(isinstance(text, str) for text in (*undersampled, reverted or "")):
            raise ValueError("not the report of a window: a name is not text")
        index, num_windows, before, after, changed = scalars
        return cls(
            index=index,
            num_windows=num_windows,
            start=start,
            stop=stop,
            loss_before=before,
            loss_after=after,
            reverted=reverted,
            changed=changed,
            sqnr_db=decibels,
            experts=experts,
            smoothed=smoothed,
            undersampled=undersampled,
            costs=_costs(values),
        )


def report_from_dict(values: Mapping[str, Any]) -> WindowReport | EpochReport:
    """The report of a window or of an epoch.

    Raises:
        ValueError: the values are neither.
    """
    return WindowReport.from_dict(values) if "window" in values else EpochReport.from_dict(values)


def _value(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise ValueError(f"{name} is missing")
    return values[name]


def _costs(values: Mapping[str, Any]) -> Costs | None:
    return Costs.from_dict(values["costs"]) if "costs" in values else None


def _require_numbers(values: Any) -> None:
    for value in values:
        if type(value) not in (int, float):
            raise ValueError(f"{value!r} is not a number")
