"""Facts of a run or of its result that a report shows."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from cbqstream.models.families import EXPERT
from cbqstream.records import EpochReport, WindowReport
from cbqstream.report.progress import duration
from cbqstream.rundir.identity import Identity
from cbqstream.runtime.memory import GIB
from cbqstream.scheme import Scheme

_NAMED = 8
"""Largest number of reverted windows whose numbers are listed."""
_IN_BLOCK = re.compile(r".*?\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Facts of a run, finished or not, or of a result whose run directory is not available.

    Raises:
        ValueError: the report of a window names a layer that is not in a block.
    """

    name: str
    scheme: Scheme
    num_windows: int
    """Number of windows of the run, finished or not."""
    windows: Sequence[WindowReport]
    """Reports of the finished windows."""
    epochs: Sequence[EpochReport]
    """Reports of the finished epochs of the end-to-end stage."""
    weights: int
    """Number of weights in quantized layers."""
    stored: int
    """Size in bytes of the codes, scales and zero points of quantized layers."""
    sizes: Mapping[str, int]
    """Size in bytes of all tensors of each model, by its role: `source` or `result`."""
    perplexities: dict[str, float] = field(default_factory=dict)
    """Perplexity of each model, by its role: `source` or `result`."""
    identity: Identity | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        for window in self.windows:
            for path in (*window.sqnr_db, *window.smoothed):
                _in_block(path)

    @property
    def places(self) -> list[int]:
        """Numbers of the finished windows, from 1."""
        return [window.index + 1 for window in self.windows]

    def rows(self) -> list[tuple[str, str]]:
        """Names and values of the most important facts, as text."""
        scheme, windows, epochs = self.scheme, self.windows, self.epochs
        rows = [("scheme", f"{scheme.name}, {grid_in_words(scheme)}")]
        if self.weights:
            rows.append(
                ("bits per weight", f"{8 * self.stored / self.weights:.3f} of {self.weights:,} quantized weights")
            )
        rows += [(f"size, {name}", f"{size / GIB:.2f} GiB") for name, size in self.sizes.items()]
        rows += [(f"perplexity, {name}", f"{value:.3f}") for name, value in self.perplexities.items()]
        rows.append(("windows", f"{len(windows)} of {self.num_windows} done"))
        if windows:
            rows.append(("codes changed from nearest", f"{mean(window.changed for window in windows):.2%}"))
            reverted = [str(window.index + 1) for window in windows if window.reverted]
            which = f"windows {', '.join(reverted)}" if len(reverted) <= _NAMED else f"{len(reverted)} windows"
            rows.append(("reverted", which if reverted else "no window"))
        if epochs:
            rows.append(("end to end", f"{epochs[0].loss_before:.4f} to {epochs[-1].loss_after:.4f} nats"))
        everything: list[WindowReport | EpochReport] = [*windows, *epochs]
        costs = [report.costs for report in everything if report.costs is not None]
        if costs:
            rows.append(("time", duration(sum(cost.seconds for cost in costs))))
            rows.append(("memory", f"{max(cost.peak_rss for cost in costs) / GIB:.2f} GiB at most"))
        return rows

    def sqnr_db(self) -> dict[str, dict[int, float]]:
        """Signal to quantization noise of the weights in decibels, by layer and block; for experts, the mean over the experts."""
        found: dict[str, dict[int, list[float]]] = {}
        for window in self.windows:
            for path, decibels in window.sqnr_db.items():
                block, layer = _in_block(path)
                found.setdefault(EXPERT.sub(".experts.", layer), {}).setdefault(block, []).append(decibels)
        return {layer: {block: mean(values) for block, values in blocks.items()} for layer, blocks in found.items()}

    def smoothed(self) -> dict[str, dict[int, int]]:
        """Number of rescaled channels, by smoothed layer and block; for experts, the sum over the experts."""
        found: dict[str, dict[int, int]] = {}
        for window in self.windows:
            for path, (channels, _) in window.smoothed.items():
                block, layer = _in_block(path)
                blocks = found.setdefault(EXPERT.sub(".experts.", layer), {})
                blocks[block] = blocks.get(block, 0) + channels
        return found


def grid_in_words(scheme: Scheme) -> str:
    """Description of the scales and zero points of weights, such as "groups of 128, symmetric"."""
    size = "one scale per channel" if scheme.group_size is None else f"groups of {scheme.group_size}"
    return f"{size}, {'symmetric' if scheme.symmetric else 'with zero points'}"


def _in_block(path: str) -> tuple[int, str]:
    """Number of the block of a layer, and name of the layer in the block."""
    match = _IN_BLOCK.fullmatch(path)
    if match is None:
        raise ValueError(f"{path} is not in a block")
    return int(match[1]), match[2]
