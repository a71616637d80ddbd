"""The report of a window, made from the result of its reconstruction and from its blocks, and the costs of windows and epochs."""

from collections.abc import Sequence

import torch

from cbqstream.models.experts import tokens_by_expert
from cbqstream.records import Costs, Window, WindowReport
from cbqstream.run.inputs import RunInputs
from cbqstream.runtime.device import peak_device_bytes
from cbqstream.runtime.memory import peak_resident_bytes
from cbqstream.runtime.timings import Clock
from cbqstream.transforms.smoothing import Smoothing
from cbqstream.windows.reconstruct import Reconstruction
from cbqstream.windows.resident_block import ResidentBlock


def window_report(
    inputs: RunInputs,
    window: Window,
    result: Reconstruction,
    new: Sequence[ResidentBlock],
    leaving: Sequence[ResidentBlock],
    spent: Clock,
) -> WindowReport:
    """Make the report of a window.

    Args:
        inputs: inputs of the run.
        window: the window.
        result: result of its reconstruction.
        new: blocks that entered with this window.
        leaving: hardened blocks that leave with this window.
        spent: time that the window took.
    """
    prefix = {block.index: inputs.meta_model.blocks[block.index].prefix for block in (*new, *leaving)}
    return WindowReport(
        index=window.index,
        num_windows=len(inputs.windows),
        start=window.start,
        stop=window.stop,
        loss_before=result.loss_before,
        loss_after=result.loss_after,
        reverted=result.reverted,
        changed=result.changed,
        sqnr_db={f"{prefix[block.index]}.{name}": value for block in leaving for name, value in block.sqnr_db.items()},
        experts={
            f"{prefix[block.index]}.{path}": counts
            for block in new
            for path, counts in tokens_by_expert(block.tokens).items()
        },
        smoothed={
            f"{prefix[block.index]}.{layer}": (int((scale != 1).sum()), scale.max().item())
            for block in new
            for layer, scale in block.found.get(Smoothing.name, {}).items()
        },
        undersampled=[f"{prefix[block.index]}.{name}" for block in new for name in sorted(block.undersampled)],
        costs=costs_of(spent, inputs.compute.device),
    )


def costs_of(spent: Clock, device: torch.device) -> Costs:
    """Costs of a window or an epoch that ends now.

    Args:
        spent: time that it took.
        device: device that computed.
    """
    return Costs(
        seconds=spent.time,
        reading=spent.reading,
        writing=spent.writing,
        peak_rss=peak_resident_bytes(),
        peak_vram=peak_device_bytes(device),
    )
