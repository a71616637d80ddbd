"""Propagation of the two streams from boundary to boundary, and the targets of a window."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cbqstream.activations.map_segments import map_segments
from cbqstream.activations.store import ActivationStore
from cbqstream.activations.token_store import TokenStore
from cbqstream.errors import InputError
from cbqstream.models.block import advance, handed_values
from cbqstream.numerics.losses import mixed_target
from cbqstream.records import Compute
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.resident_block import (
    ResidentBlock,
    advance_blocks,
    as_batch,
    run_blocks,
    values_beside,
    values_without_sums,
)
from cbqstream.windows.routed_experts import Routed


@torch.no_grad()
def propagate(
    blocks: Sequence[ResidentBlock],
    source: ActivationStore,
    destination: ActivationStore,
    compute: Compute,
    *,
    phase: Phase,
) -> None:
    """Run every segment of `source` through the blocks, and store the results in `destination`, with the values that are handed on.

    Args:
        blocks: consecutive blocks.
        source: the stream at the input of the first block.
        destination: the stream at the output of the last block.
        compute: device, dtype and batch size.
        phase: which weights the blocks compute with.

    Raises:
        InputError: a result is infinite or NaN.
    """
    finite, beside = [], values_beside(blocks, source)

    def run(x_BSD: Tensor, *values: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        y_BSD, after = advance_blocks(blocks, x_BSD.to(compute.dtype), phase, as_batch(beside, values))
        finite.append(torch.isfinite(y_BSD).all(dim=2).all(dim=1))
        return y_BSD, handed_values(after)

    sources = [source, *(value.store for value in beside.values())]
    map_segments(sources, destination, compute.batch_size, compute.device, run)
    broken = int((~torch.cat(finite)).sum())  # the only synchronization with the device
    if broken:
        numbers = f"{blocks[0].index}-{blocks[-1].index}" if len(blocks) > 1 else str(blocks[0].index)
        total = source.shape.num_segments
        raise InputError(
            f"block {numbers}", f"{broken} of {total} segments are not finite. Look for very large weights."
        )


@torch.no_grad()
def mix_targets(
    blocks: Sequence[ResidentBlock],
    quantized: ActivationStore,
    reference_out: ActivationStore,
    targets: ActivationStore,
    compute: Compute,
    *,
    a: float,
) -> None:
    """Compute and store the targets of a window, `a T1 + (1 - a) T2`.

    Args:
        blocks: blocks of the window; they run with their original weights.
        quantized: quantized stream at the input of the window, from which the blocks compute T2.
        reference_out: reference stream at the output of the window, which is T1.
        targets: store for the targets.
        compute: device, dtype and batch size.
        a: share of T1.
    """
    beside = values_beside(blocks, quantized)

    def run(x_BSD: Tensor, t1_BSD: Tensor, *values: Tensor) -> Tensor:
        t2_BSD = run_blocks(blocks, x_BSD.to(compute.dtype), Phase.ORIGINAL, as_batch(beside, values))
        return mixed_target(t1_BSD.to(compute.dtype), t2_BSD, a)

    sources = [quantized, reference_out, *(value.store for value in beside.values())]
    map_segments(sources, targets, compute.batch_size, compute.device, run)


@torch.no_grad()
def route(
    block: ResidentBlock, stream: ActivationStore, inputs: TokenStore, compute: Compute, *, phase: Phase
) -> Routed:
    """Inputs of the routed experts of a block, and the choices of its router, for all segments of a stream.

    Args:
        block: a block whose experts are not in memory.
        stream: the stream at the input of the block.
        inputs: store for the inputs of the experts.
        compute: device, dtype and batch size.
        phase: which weights the other layers of the block compute with.

    Raises:
        InputError: the block does not send every token to its experts once.
    """
    experts, routed = block.experts, Routed(inputs)
    if experts is None:
        raise ValueError("the block has no routed experts")
    for layer in block.layers.values():
        layer.phase = phase
    beside = values_without_sums(block, stream)

    def run(x_BSD: Tensor, *values: Tensor) -> Tensor:
        seen: list[Tensor] = []
        experts.record(routed.chosen, routed.weights, seen)
        advance(block.module, x_BSD.to(compute.dtype), block.arguments, beside=as_batch(beside, values))
        x_TD = torch.cat(seen)
        if x_TD.shape[:-1] != (x_BSD.shape[0] * x_BSD.shape[1],):
            raise InputError(f"block {block.index}", "does not send every token to its experts once.")
        return x_TD.view(*x_BSD.shape[:2], -1)

    sources = [stream, *(value.store for value in beside.values())]
    map_segments(sources, inputs, compute.batch_size, compute.device, run)
    return routed
