"""Moving the two streams from boundary to boundary, and the targets that come of it."""

from collections.abc import Sequence

import torch

from cbqstream.activations.read_ahead import in_batches, read_batches
from cbqstream.activations.store import ActivationStore
from cbqstream.activations.write_behind import write_behind
from cbqstream.errors import InputError
from cbqstream.numerics.losses import mixed_target
from cbqstream.records import Compute
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.resident import ResidentBlock, run_blocks


@torch.no_grad()
def propagate(
    blocks: Sequence[ResidentBlock],
    source: ActivationStore,
    destination: ActivationStore,
    compute: Compute,
    *,
    phase: Phase,
) -> None:
    """Run every segment of `source` through the blocks and store it in `destination`.

    Raises:
        InputError: some become infinite or NaN.
    """
    finite = []
    batches = in_batches(range(source.shape.num_segments), compute.batch_size)
    with write_behind(destination) as write:
        for batch, (x_BSD,) in zip(batches, read_batches([source], batches, compute.device), strict=True):
            y_BSD = run_blocks(blocks, x_BSD.to(compute.dtype), phase)
            finite.append(torch.isfinite(y_BSD).all(dim=2).all(dim=1))
            for segment, y_SD in zip(batch, y_BSD, strict=True):
                write(segment, y_SD)
    broken = int((~torch.cat(finite)).sum())  # the device is asked once
    if broken:
        numbers = f"{blocks[0].index}-{blocks[-1].index}" if len(blocks) > 1 else str(blocks[0].index)
        total = source.shape.num_segments
        raise InputError(f"block {numbers}", f"{broken} of {total} samples became non-finite. Look for huge weights.")


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
    """Targets of a window: `a T1 + (1 - a) T2`.

    Args:
        blocks: of the window; they run with their original weights.
        quantized: the quantized stream at its input; the blocks give T2 for it.
        reference_out: the reference stream at its output, T1.
        targets: where the mix goes.
        compute: where and how.
        a: share of T1.
    """
    batches = in_batches(range(quantized.shape.num_segments), compute.batch_size)
    with write_behind(targets) as write:
        read = read_batches([quantized, reference_out], batches, compute.device)
        for batch, (x_BSD, t1_BSD) in zip(batches, read, strict=True):
            t2_BSD = run_blocks(blocks, x_BSD.to(compute.dtype), Phase.ORIGINAL)
            mixed_BSD = mixed_target(t1_BSD.to(compute.dtype), t2_BSD, a)
            for segment, t_SD in zip(batch, mixed_BSD, strict=True):
                write(segment, t_SD)
