"""Residuals of a block whose routed experts are reconstructed alone: what the sums of its experts lack, so that its output is the target.

Shapes: B batch, S tokens in a segment, D hidden dimension.
"""

import torch
from torch import Tensor

from cbqstream.activations.map_segments import map_segments
from cbqstream.activations.store import ActivationStore
from cbqstream.records import Compute
from cbqstream.windows.quantized_linear import Phase
from cbqstream.windows.resident_block import ResidentBlock, as_batch, run_blocks, values_without_sums
from cbqstream.windows.routed_experts import RoutedExperts

_LARGEST_ERROR = 0.05
"""Relative error up to which a block is taken to add the sums of its experts. Products in bf16 have errors below it."""


@torch.no_grad()
def factor_of_sums(
    block: ResidentBlock, experts: RoutedExperts, stream: ActivationStore, compute: Compute
) -> float | None:
    """Factor with which a block adds the sums of its routed experts to its output, such as 1 or a residual multiplier.

    The block runs on one segment with zeros, and with random sums whose size varies from token to token.

    Args:
        block: the block.
        experts: its experts, which are not in memory.
        stream: stream at the input of the block.
        compute: device and dtype.

    Returns:
        The factor; None if the block does more with the sums than add them, for example because a norm follows.
    """
    beside = values_without_sums(block, stream)
    read = [store.read(0).to(compute.device)[None] for store in (stream, *(value.store for value in beside.values()))]
    x_1SD, values = read[0].to(compute.dtype), as_batch(beside, read[1:])

    def output(sums_1SD: Tensor) -> Tensor:
        return run_blocks([block], x_1SD, Phase.HARD, {**values, experts.key: sums_1SD}).float()

    generator = torch.Generator().manual_seed(0)
    shape = (1, x_1SD.shape[1], experts.hidden_size)
    sizes_1S1 = torch.rand(*shape[:2], 1, generator=generator) + 0.5
    sums_1SD = (torch.randn(shape, generator=generator) * sizes_1S1).to(compute.device)
    without_1SD = output(torch.zeros_like(sums_1SD))
    sums_1SD *= without_1SD.square().mean().sqrt()  # as large as the hidden states, so that rounding hides nothing
    added_1SD = output(sums_1SD) - without_1SD
    if added_1SD.shape != sums_1SD.shape:
        return None
    factor = (added_1SD * sums_1SD).sum() / sums_1SD.square().sum()
    error = (added_1SD - factor * sums_1SD).square().sum() / (factor * sums_1SD).square().sum()
    return factor.item() if error <= _LARGEST_ERROR**2 else None  # NaN is not smaller


@torch.no_grad()
def replace_sums_by_residuals(
    block: ResidentBlock,
    experts: RoutedExperts,
    stream: ActivationStore,
    targets: ActivationStore,
    sums: ActivationStore,
    compute: Compute,
    *,
    factor: float,
) -> None:
    """Replace the sums of the routed experts of a block by what they lack, (target - output of the block) / factor.

    Args:
        block: the block; its layers outside the experts compute with hard weights.
        experts: its experts.
        stream: quantized stream at its input.
        targets: targets for its output.
        sums: the sums of its original experts, which are replaced.
        compute: device, dtype and batch size.
        factor: see `factor_of_sums`.
    """
    beside = values_without_sums(block, stream)

    def run(x_BSD: Tensor, target_BSD: Tensor, sums_BSD: Tensor, *values: Tensor) -> Tensor:
        batch = {**as_batch(beside, values), experts.key: sums_BSD}
        y_BSD = run_blocks([block], x_BSD.to(compute.dtype), Phase.HARD, batch)
        return (target_BSD.float() - y_BSD.float()) / factor

    sources = [stream, targets, sums, *(value.store for value in beside.values())]
    map_segments(sources, sums, compute.batch_size, compute.device, run)
