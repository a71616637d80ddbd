"""End-to-end training of the scales of the whole model from its predictions, with one block in memory at a time.

After the last window, codes are final. Every scale gets a factor exp(theta). A training step runs forward through all blocks, keeps the
hidden states between them, and runs backward through the blocks in reverse, computing each again with gradients. The loss is the
divergence of the next-token distribution from that of the original model (`head_divergence`). Training scales alone, end to end, is E2E-QP
of EfficientQAT (Chen et al. 2024, arXiv 2407.11062); there the model is in memory, and the loss is the cross-entropy of text.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cbqstream.activations.read_ahead import in_batches, in_shuffled_batches, read_batches
from cbqstream.activations.store import ActivationStore
from cbqstream.models.block import STATE, BlockArguments, advance
from cbqstream.numerics.affine import grouped, storable_scale
from cbqstream.numerics.losses import Head, head_divergence
from cbqstream.records import Compute
from cbqstream.windows.optimizer import adam

SEGMENTS_PER_STEP = 2
"""Largest number of segments in a training step. It is small because an epoch over a few dozen segments has few steps."""


class _Scaled(torch.autograd.Function):
    """Product w * factor in the dtype of w. It is computed in float32, because bf16 values near 1 are 0.8 % apart.

    Only the factor has a gradient.
    """

    @staticmethod
    def forward(ctx: Any, w_OGK: Tensor, factor_OG: Tensor) -> Tensor:
        ctx.save_for_backward(w_OGK)
        return (w_OGK.float() * factor_OG.unsqueeze(-1)).to(w_OGK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (w_OGK,) = ctx.saved_tensors
        return None, (grads[0].float() * w_OGK.float()).sum(-1)


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Learned scales of one layer, `s = s0 * exp(theta)`, float32 [O, G]."""

    scale0: Tensor
    theta: nn.Parameter

    @classmethod
    def at(cls, scale0: Tensor) -> "StepSizes":
        """Scales that start at `scale0`."""
        return cls(scale0, nn.Parameter(torch.zeros_like(scale0)))

    @torch.no_grad()
    def stored(self) -> Tensor:
        """Scales as they are stored, float32 [O, G]."""
        return storable_scale(self.scale0 * self.theta.exp())

    def factor(self, *, stored: bool) -> Tensor:
        """Factor [O, G] for a weight that was dequantized with s0.

        Args:
            stored: whether the factor gives the scales as they are stored; otherwise it is exp(theta), and differentiable in theta.
        """
        return self.stored() / self.scale0 if stored else self.theta.exp()


@dataclass(frozen=True, slots=True)
class StreamedModel:
    """The quantized model, of which one block is in memory at a time."""

    build: Callable[[int], nn.Module]
    """Builds a block with dequantized weights from its number."""
    arguments: Sequence[BlockArguments]
    """Keyword arguments of every block."""
    steps: Sequence[Mapping[str, StepSizes]]
    """Scales of the quantized layers of every block, by name; empty for a block in full precision."""
    head: Head
    compute: Compute

    def run(
        self, index: int, x_BSD: Tensor, beside: Mapping[str, Tensor], *, stored: bool = False
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Hidden states [B, S, D] after a block, and the values beside them.

        Args:
            index: number of the block.
            x_BSD: hidden states before the block.
            beside: values of the segments beside the hidden states, by key.
            stored: whether to compute with the scales as they are stored; otherwise the result is differentiable in x and theta.
        """
        block, weights = self.build(index), {}
        for name, steps in self.steps[index].items():
            w_OGK = grouped(block.get_parameter(f"{name}.weight"), steps.theta.shape[1])
            weights[f"{name}.weight"] = _Scaled.apply(w_OGK, steps.factor(stored=stored)).flatten(1)  # type: ignore[no-untyped-call]
        return advance(block, x_BSD, self.arguments[index], weights, beside=beside)

    @torch.no_grad()
    def forward(self, x_BSD: Tensor, beside: Mapping[str, Tensor]) -> list[tuple[Tensor, Mapping[str, Tensor]]]:
        """Inputs of all blocks, and the output of the last block, with the values beside them.

        Args:
            x_BSD: hidden states before the first block.
            beside: values of the segments beside them, by key.
        """
        states = [(x_BSD, beside)]
        for index in range(len(self.steps)):
            states.append(self.run(index, *states[-1]))
        return states

    def backward(self, states: list[tuple[Tensor, Mapping[str, Tensor]]], gradient_BSD: Tensor) -> None:
        """Accumulate the gradient of every theta.

        Args:
            states: the result of `forward`; the list is emptied.
            gradient_BSD: gradient of the loss for the last hidden states.
        """
        states.pop()
        gradients: dict[str, Tensor] = {}  # of the values that the block hands on
        first = next(index for index, steps in enumerate(self.steps) if steps)
        for index in range(len(self.steps) - 1, first - 1, -1):
            x_BSD, beside = states.pop()
            x_BSD.requires_grad_()
            leaves = {
                key: value.detach().requires_grad_() for key, value in beside.items() if _is_learned_from(key, value)
            }
            y_BSD, after = self.run(index, x_BSD, {**beside, **leaves})
            handed = [key for key in gradients if after[key].requires_grad]
            outputs = [y_BSD, *(after[key] for key in handed)]
            torch.autograd.backward(outputs, [gradient_BSD, *(gradients[key] for key in handed)])
            if x_BSD.grad is None:
                raise RuntimeError("a block does not depend on its input")
            gradient_BSD = x_BSD.grad
            gradients = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}


def _is_learned_from(key: str, value: Tensor) -> bool:
    """Whether a value beside hidden states passes gradients to the block before."""
    return key.startswith(STATE) and value.is_floating_point()


@dataclass(frozen=True, slots=True)
class EndToEndData:
    """Inputs of the first block, and outputs of the last block of the original model."""

    enter: Callable[[int], tuple[Tensor, Mapping[str, Tensor]]]
    """Gives the input of the first block, [S, D], and the values beside it by key, from the number of a segment."""
    reference: ActivationStore
    """Hidden states of the original model after its last block."""

    def read(
        self, batches: Sequence[Sequence[int]], compute: Compute
    ) -> Iterator[tuple[Tensor, Mapping[str, Tensor], Tensor]]:
        """Inputs of each batch [B, S, D], values beside them by key, and outputs [B, S, D], on the device."""
        read = read_batches([self.reference], batches, compute.device)
        for batch, (reference_BSD,) in zip(batches, read, strict=True):
            entered = [self.enter(segment) for segment in batch]
            x_BSD = torch.stack([x_SD for x_SD, _ in entered])
            beside = {key: torch.stack([values[key] for _, values in entered]) for key in entered[0][1]}
            yield x_BSD, beside, reference_BSD.to(compute.dtype)


@torch.no_grad()
def stored_divergence(model: StreamedModel, data: EndToEndData, segments: Sequence[int]) -> float:
    """Mean divergence of the predictions over the tokens of segments, with the scales as they are stored.

    Args:
        model: the quantized model.
        data: inputs and references.
        segments: numbers of the segments.
    """
    total = 0.0
    for x_BSD, beside, reference_BSD in data.read(in_batches(segments, model.compute.batch_size), model.compute):
        for index in range(len(model.steps)):
            x_BSD, beside = model.run(index, x_BSD, beside, stored=True)
        divergence = head_divergence(x_BSD.flatten(0, 1), reference_BSD.flatten(0, 1), model.head)
        total += divergence.double().item() * len(x_BSD)
    return total / len(segments)


def train_epoch(
    model: StreamedModel,
    data: EndToEndData,
    segments: Sequence[int],
    rates: tuple[float, float],
    generator: torch.Generator,
) -> None:
    """Train every theta in place, in one pass over `segments` in a random order.

    Args:
        model: the model whose scales are trained.
        data: inputs and targets.
        segments: segments to train on.
        rates: learning rate of theta (Adam) at the first step and after the last; it falls linearly.
        generator: gives the order of the segments.
    """
    learned = [steps.theta for block in model.steps for steps in block.values()]
    optimizer = adam([{"params": learned, "lr": rates[0]}])
    batches = in_shuffled_batches(segments, min(SEGMENTS_PER_STEP, model.compute.batch_size), generator)
    for step, (x_BSD, beside, reference_BSD) in enumerate(data.read(batches, model.compute)):
        optimizer.param_groups[0]["lr"] = rates[0] + (rates[1] - rates[0]) * step / len(batches)
        states = model.forward(x_BSD, beside)
        last_BSD = states[-1][0].requires_grad_()
        loss = head_divergence(last_BSD.flatten(0, 1), reference_BSD.flatten(0, 1), model.head)
        (gradient_BSD,) = torch.autograd.grad(loss, last_BSD)
        optimizer.zero_grad()
        model.backward(states, gradient_BSD)
        optimizer.step()
