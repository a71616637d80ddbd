"""Reconstruction of one window: scales and rounding are trained until the output of the window is closest to its target."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam

from cbqstream.activations.read_ahead import in_batches, in_shuffled_batches, read_batches
from cbqstream.activations.store import ActivationStore
from cbqstream.config import ReconstructionConfig, Schedule
from cbqstream.errors import InputError
from cbqstream.numerics.losses import Head, LossShape, head_divergence, reconstruction_loss
from cbqstream.records import Compute
from cbqstream.rounding.registry import method_of
from cbqstream.rounding.rounding import Rounding, TrainingStep
from cbqstream.windows.input_step import InputStep
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


@dataclass(frozen=True, slots=True)
class WindowData:
    """Inputs and targets of a window."""

    inputs: ActivationStore
    """Quantized stream at the input of the window."""
    targets: ActivationStore
    """Targets for the output of the window."""
    compute: Compute
    predictions: Predictions | None = None
    """Predictions of the original model, in the window that ends with the last block; otherwise None."""

    def read(self, blocks: Sequence[ResidentBlock], batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Each batch of segments for some blocks, read ahead."""
        beside, dtype = values_beside(blocks, self.inputs), self.compute.dtype
        references = [] if self.predictions is None else [self.predictions.reference]
        stores = [self.inputs, self.targets, *(value.store for value in beside.values()), *references]
        for x_BSD, target_BSD, *more in read_batches(stores, batches, self.compute.device):
            reference = more.pop().to(dtype) if references else None
            yield Batch(x_BSD.to(dtype), target_BSD.float(), reference, as_batch(beside, more))


def reconstruct(
    blocks: Sequence[ResidentBlock],
    data: WindowData,
    config: ReconstructionConfig,
    generator: torch.Generator,
    starting_state: Callable[[ResidentBlock], Mapping[str, Tensor]],
) -> Reconstruction:
    """Train the roundings and scales of a window in place. Training that increases the loss on the held-out segments is reverted.

    Args:
        blocks: the window; its layers have roundings.
        data: the quantized stream at the input of the window, and its targets.
        config: settings.
        generator: gives the order of the segments.
        starting_state: the state of a block before training, as `ResidentBlock.load` takes it; only called if training is reverted.

    Raises:
        InputError: the window gives values that are not finite before training.
    """
    training, held_out = split_held_out(data.inputs.shape.num_segments)
    roundings = [layer.rounding for layer in all_layers(blocks) if layer.rounding is not None]
    input_steps = [layer.input_step for layer in all_layers(blocks) if layer.input_step is not None]
    before = hard_loss(blocks, data, held_out, config)
    if not math.isfinite(before):
        first, last = blocks[0].index, blocks[-1].index
        raise InputError(
            f"blocks {first}-{last}", "their activations are not finite. Look for NaN or Inf in the weights."
        )
    after, reverted = before, None
    order = _training_order(training, config, generator)
    if order:
        _train(blocks, roundings, input_steps, data, order, config)
        after = hard_loss(blocks, data, held_out, config)
        if not after <= before:
            reverted = WORSE if math.isfinite(after) else NOT_FINITE
            for block in blocks:
                block.load(starting_state(block))
            after = before
    counts = [rounding.changed() for rounding in roundings]
    changed = sum(moved for moved, _ in counts) / sum(total for _, total in counts)
    return Reconstruction(before, after, reverted, changed)


@torch.no_grad()
def hard_loss(
    blocks: Sequence[ResidentBlock], data: WindowData, segments: Sequence[int], config: ReconstructionConfig
) -> float:
    """Mean loss of the window over segments, with hard weights.

    Args:
        blocks: the window; its layers have roundings.
        data: inputs and targets of the window.
        segments: numbers of the segments.
        config: settings.
    """
    batches = in_batches(segments, config.batch_size)
    total = torch.zeros((), dtype=torch.float64, device=data.compute.device)
    for batch in data.read(blocks, batches):
        h_BSD = run_blocks(blocks, batch.x, Phase.HARD, batch.beside)
        total += _loss(h_BSD, batch, data.predictions, config, 0).double() * len(batch.x)
    return total.item() / len(segments)


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
    data: WindowData,
    order: list[list[int]],
    config: ReconstructionConfig,
) -> None:
    steps = len(order)
    groups = [
        {"params": [rounding.theta for rounding in roundings], "lr": config.scale_lr},
        {"params": [step.theta for step in input_steps], "lr": config.activation_scale_lr},
        {
            "params": [value for rounding in roundings for value in rounding.rounding_parameters()],
            "lr": config.rounding_lr,
        },
    ]
    optimizer = Adam([group for group in groups if group["params"]], foreach=False)
    rates = [group["lr"] for group in optimizer.param_groups]
    checkpointing = data.compute.memory_mode.activation_checkpointing
    for step, batch in enumerate(data.read(blocks, order)):
        rate_left = share_of_rate(step / steps, config.schedule)
        now = TrainingStep(step / steps, rate_left, steps, len(roundings))
        for rounding in roundings:
            rounding.begin_step(now)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rate_left  # not by a scheduler, which would keep the optimizer alive in a cycle
        h_BSD = run_blocks(blocks, batch.x, Phase.SOFT, batch.beside, activation_checkpointing=checkpointing)
        loss = _loss(h_BSD, batch, data.predictions, config, step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def share_of_rate(progress: float, schedule: Schedule) -> float:
    """Factor of a learning rate after `progress` (0 to 1) of the steps. Its mean over a window is 1/2."""
    return 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2


def _loss(
    h_BSD: Tensor, batch: Batch, predictions: Predictions | None, config: ReconstructionConfig, step: int
) -> Tensor:
    shape = LossShape(config.kl_weight, config.token_balance, config.channel_balance, config.robust_tokens)
    loss = reconstruction_loss(h_BSD, batch.target, shape)
    if predictions is not None and batch.reference is not None:
        stride = min(config.head_stride, h_BSD.shape[1])
        seen = slice(step % stride, None, stride)
        h_TD, reference_TD = (states[:, seen].flatten(0, 1) for states in (h_BSD, batch.reference))
        loss = loss + config.head_weight * head_divergence(h_TD, reference_TD, predictions.head)
    return loss
