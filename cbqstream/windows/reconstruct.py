"""Reconstruction of one window: scales and rounding are trained until the output of the window is closest to its target."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from cbqstream.activations.read_ahead import in_batches, in_shuffled_batches, read_batches
from cbqstream.activations.store import ActivationStore
from cbqstream.config import ReconstructionConfig, Schedule
from cbqstream.errors import InputError
from cbqstream.numerics.losses import Head, LossShape, head_divergence, reconstruction_loss
from cbqstream.records import Compute
from cbqstream.rounding.registry import method_of
from cbqstream.rounding.rounding import Rounding, TrainingStep
from cbqstream.windows.input_step import InputStep
from cbqstream.windows.optimizer import adam
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.resident_block import ResidentBlock, all_layers, as_batch, run_blocks, values_beside
from cbqstream.windows.schedule import split_held_out

WORSE, NOT_FINITE = "held-out loss increased", "not finite"
"""Reasons why the training of a window is reverted."""


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Result of a reconstruction."""

    loss_before: float
    """Loss of the hard window on the held-out segments before training."""
    loss_after: float
    """Loss of the hard window on the held-out segments after training; never above `loss_before`."""
    reverted: str | None
    """Why the training was reverted, or None if it was kept."""
    changed: float
    """Share of codes that differ from rounding to nearest."""
    codes: int
    """Number of codes."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """The predictions of the original model, for the window that ends with the last block."""

    head: Head
    reference: ActivationStore
    """Hidden states of the original model after its last block."""


class Batch(NamedTuple):
    """A batch of segments on the device."""

    x: Tensor
    """Inputs [B, S, D]."""
    target: Tensor
    """Targets [B, S, D], float32."""
    reference: Tensor | None
    """Hidden states of the original model after its last block [B, S, D]; None in windows that do not end with it."""
    beside: Mapping[str, Tensor]
    """Values of the segments beside the hidden states, by key."""


_Batch = TypeVar("_Batch")


class TrainingData(ABC, Generic[_Batch]):
    """Data from which some blocks learn, by segment of the calibration text."""

    compute: Compute
    config: ReconstructionConfig

    @property
    @abstractmethod
    def num_segments(self) -> int:
        """Number of segments."""

    def covers(self, segments: Sequence[int]) -> bool:
        """Whether the data have a token of some segments."""
        return True

    @abstractmethod
    def read(self, blocks: Sequence[ResidentBlock], batches: Sequence[Sequence[int]]) -> Iterator[_Batch]:
        """Data of each batch of segments for the blocks."""

    @abstractmethod
    def size(self, batch: _Batch) -> int:
        """Weight of a batch in a mean over batches."""

    @abstractmethod
    def loss(self, blocks: Sequence[ResidentBlock], batch: _Batch, phase: Phase, step: int) -> Tensor:
        """Mean loss of the blocks over a batch, a float32 scalar.

        Args:
            blocks: the blocks that learn.
            batch: the data.
            phase: weights that the blocks compute with.
            step: number of the training step.
        """


@dataclass(frozen=True, slots=True)
class WindowData(TrainingData[Batch]):
    """Inputs and targets of a window."""

    inputs: ActivationStore
    """Quantized stream at the input of the window."""
    targets: ActivationStore
    """Targets for the output of the window."""
    compute: Compute
    config: ReconstructionConfig
    predictions: Predictions | None = None
    """Predictions of the original model, in the window that ends with the last block; otherwise None."""

    @property
    @override
    def num_segments(self) -> int:
        return self.inputs.shape.num_segments

    @override
    def read(self, blocks: Sequence[ResidentBlock], batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Each batch of segments for some blocks, read ahead."""
        beside, dtype = values_beside(blocks, self.inputs), self.compute.dtype
        references = [] if self.predictions is None else [self.predictions.reference]
        stores = [self.inputs, self.targets, *(value.store for value in beside.values()), *references]
        for x_BSD, target_BSD, *more in read_batches(stores, batches, self.compute.device):
            reference = more.pop().to(dtype) if references else None
            yield Batch(x_BSD.to(dtype), target_BSD.float(), reference, as_batch(beside, more))

    @override
    def size(self, batch: Batch) -> int:
        return len(batch.x)

    @override
    def loss(self, blocks: Sequence[ResidentBlock], batch: Batch, phase: Phase, step: int) -> Tensor:
        checkpointing = phase is Phase.SOFT and self.compute.memory_mode.activation_checkpointing
        h_BSD = run_blocks(blocks, batch.x, phase, batch.beside, activation_checkpointing=checkpointing)
        loss = reconstruction_loss(h_BSD, batch.target, loss_shape(self.config))
        if self.predictions is not None and batch.reference is not None:
            stride = min(self.config.head_stride, h_BSD.shape[1])
            seen = slice(step % stride, None, stride)
            h_TD, reference_TD = (states[:, seen].flatten(0, 1) for states in (h_BSD, batch.reference))
            loss = loss + self.config.head_weight * head_divergence(h_TD, reference_TD, self.predictions.head)
        return loss


def loss_shape(config: ReconstructionConfig) -> LossShape:
    """Weights of the reconstruction loss."""
    return LossShape(config.kl_weight, config.token_balance, config.channel_balance, config.robust_tokens)


def reconstruct(
    blocks: Sequence[ResidentBlock],
    data: TrainingData[_Batch],
    generator: torch.Generator,
    starting_state: Callable[[ResidentBlock], Mapping[str, Tensor]],
    compute_codes: Callable[[], None] | None = None,
) -> Reconstruction:
    """Train the roundings and scales of a window in place. Training that increases the loss on the held-out segments is reverted.

    Args:
        blocks: the window, or one expert; their layers have roundings.
        data: inputs, targets and settings.
        generator: gives the order of the segments.
        starting_state: the state of a block before training, as `ResidentBlock.load` takes it; only called if training is reverted.
        compute_codes: gives the window its codes in place of training, for a rounding method with codes in closed form.

    Raises:
        InputError: the window gives values that are not finite before training.
    """
    training, held_out = split_held_out(data.num_segments)
    held_out = held_out if data.covers(held_out) else training
    roundings = [layer.rounding for layer in all_layers(blocks) if layer.rounding is not None]
    input_steps = [layer.input_step for layer in all_layers(blocks) if layer.input_step is not None]
    before = hard_loss(blocks, data, held_out)
    if not math.isfinite(before):
        where = blocks[0].label if len(blocks) == 1 else f"blocks {blocks[0].index}-{blocks[-1].index}"
        raise InputError(where, "the activations are not finite. Look for NaN or Inf in the weights.")
    after, reverted = before, None
    order = [batch for batch in _training_order(training, data.config, generator) if data.covers(batch)]
    if roundings and (order or compute_codes is not None):
        if compute_codes is None:
            _train(blocks, roundings, input_steps, data, order)
        else:
            compute_codes()
        after = hard_loss(blocks, data, held_out)
        if not after <= before:
            reverted = WORSE if math.isfinite(after) else NOT_FINITE
            for block in blocks:
                block.load(starting_state(block))
            after = before
    counts = [rounding.changed() for rounding in roundings]
    codes = sum(total for _, total in counts)
    changed = sum(moved for moved, _ in counts) / max(codes, 1)
    return Reconstruction(before, after, reverted, changed, codes)


@torch.no_grad()
def hard_loss(blocks: Sequence[ResidentBlock], data: TrainingData[_Batch], segments: Sequence[int]) -> float:
    """Mean loss over segments, with hard weights.

    Args:
        blocks: the blocks; their layers have roundings.
        data: inputs and targets.
        segments: numbers of the segments.
    """
    batches = [batch for batch in in_batches(segments, data.config.batch_size) if data.covers(batch)]
    total, count = torch.zeros((), dtype=torch.float64, device=data.compute.device), 0
    for batch in data.read(blocks, batches):
        total += data.loss(blocks, batch, Phase.HARD, 0).double() * data.size(batch)
        count += data.size(batch)
    return total.item() / max(count, 1)


def _training_order(
    segments: Sequence[int], config: ReconstructionConfig, generator: torch.Generator
) -> list[list[int]]:
    """Batches of all epochs, each epoch in a new random order; empty if the rounding method is not trained."""
    if not method_of(config).learns:
        return []
    order = []
    for _ in range(config.epochs):
        order += in_shuffled_batches(segments, config.batch_size, generator)
    return order


def _train(
    blocks: Sequence[ResidentBlock],
    roundings: Sequence[Rounding],
    input_steps: Sequence[InputStep],
    data: TrainingData[_Batch],
    order: list[list[int]],
) -> None:
    config, steps = data.config, len(order)
    groups = [
        {"params": [rounding.theta for rounding in roundings], "lr": config.scale_lr},
        {"params": [step.theta for step in input_steps], "lr": config.activation_scale_lr},
        {
            "params": [value for rounding in roundings for value in rounding.rounding_parameters()],
            "lr": config.rounding_lr,
        },
    ]
    optimizer = adam([group for group in groups if group["params"]])
    rates = [group["lr"] for group in optimizer.param_groups]
    for step, batch in enumerate(data.read(blocks, order)):
        rate_left = share_of_rate(step / steps, config.schedule)
        now = TrainingStep(step / steps, rate_left, steps, len(roundings))
        for rounding in roundings:
            rounding.begin_step(now)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rate_left  # not by a scheduler, which would keep the optimizer alive in a cycle
        loss = data.loss(blocks, batch, Phase.SOFT, step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def share_of_rate(progress: float, schedule: Schedule) -> float:
    """Factor of a learning rate after `progress` (0 to 1) of the steps. Its mean over a window is 1/2."""
    return 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
