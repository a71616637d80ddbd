"""What is known of a run or of its result, in the form in which it is shown."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from cbqstream.config import Scheme
from cbqstream.models.families import EXPERT
from cbqstream.report.progress import duration
from cbqstream.runtime.memory import GIB

_NAMED = 8
_IN_BLOCK = re.compile(r".*?\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Of a run, finished or not, or of a result without its run."""

    name: str
    scheme: Scheme
    num_windows: int
    """That the run has, done or not."""
    windows: Sequence[Mapping[str, Any]]
    """Reports of the windows that are done (`WindowReport.to_dict`); what they cost is missing where only the result is there."""
    epochs: Sequence[Mapping[str, Any]]
    """The same of the epochs end to end."""
    weights: int
    """In quantized layers."""
    stored: int
    """Bytes of their codes, scales and zero points."""
    sizes: Mapping[str, int]
    """Bytes of a model's tensors, by what it is."""
    perplexities: dict[str, float] = field(default_factory=dict)
    """By the model."""
    identity: Mapping[str, Any] | None = None
    recipe: str | None = None

    @property
    def costs(self) -> bool:
        """Whether time and memory are known."""
        return bool(self.windows) and "reading" in self.windows[0]

    @property
    def places(self) -> list[int]:
        """Numbers of the windows, from 1."""
        return [window["window"] + 1 for window in self.windows]

    def rows(self) -> list[tuple[str, str]]:
        """What matters most, in words."""
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
            rows.append(("codes moved from the nearest", f"{mean(window['changed'] for window in windows):.2%}"))
            reverted = [str(window["window"] + 1) for window in windows if window["reverted"]]
            which = f"windows {', '.join(reverted)}" if len(reverted) <= _NAMED else f"{len(reverted)} windows"
            rows.append(("reverted", which if reverted else "no window"))
        if epochs:
            rows.append(("end to end", f"{epochs[0]['loss_before']:.4f} to {epochs[-1]['loss_after']:.4f} nats"))
        if self.costs:
            everything = [*windows, *epochs]
            rows.append(("time", duration(sum(part["seconds"] for part in everything))))
            rows.append(("memory", f"{max(part['peak_rss'] for part in everything) / GIB:.2f} GiB at most"))
        return rows

    def sqnr_db(self) -> dict[str, dict[int, float]]:
        """Signal to noise of the weights, decibels, by layer and block. Of experts, the mean."""
        found: dict[str, dict[int, list[float]]] = {}
        for window in self.windows:
            for path, decibels in window.get("sqnr_db", {}).items():
                block, layer = _in_block(path)
                found.setdefault(EXPERT.sub(".experts.", layer), {}).setdefault(block, []).append(decibels)
        return {layer: {block: mean(values) for block, values in blocks.items()} for layer, blocks in found.items()}

    def scales(self) -> dict[str, dict[int, int]]:
        """Channels that were rescaled for their outliers, by what writes them and block. Of experts, the sum."""
        found: dict[str, dict[int, int]] = {}
        for window in self.windows:
            for path, (channels, _) in window.get("scales", {}).items():
                block, writer = _in_block(path)
                blocks = found.setdefault(EXPERT.sub(".experts.", writer), {})
                blocks[block] = blocks.get(block, 0) + channels
        return found


def grid_in_words(scheme: Scheme) -> str:
    """How the scales of weights lie."""
    size = "one scale per channel" if scheme.group_size is None else f"groups of {scheme.group_size}"
    return f"{size}, {'symmetric' if scheme.symmetric else 'with zero points'}"


def require_report(line: Mapping[str, Any]) -> None:
    """Refuse a line of metrics that is not of a window or of an epoch.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is none.
    """
    numbers = [line["loss_before"], line["loss_after"]]
    if "window" in line:
        first, stop = line["blocks"]
        numbers += [line["window"], first, stop, line["changed"], *line.get("sqnr_db", {}).values()]
        numbers += [value for pair in line.get("scales", {}).values() for value in pair]
        for path in (*line.get("sqnr_db", {}), *line.get("scales", {})):
            _in_block(path)
        str(line["reverted"])
    else:
        numbers.append(line["epoch"])
    if not all(type(number) in (int, float) for number in numbers):
        raise TypeError(f"{line} holds what is no number")


def _in_block(path: str) -> tuple[int, str]:
    match = _IN_BLOCK.fullmatch(path)
    if match is None:
        raise ValueError(f"{path} is not in a block")
    return int(match[1]), match[2]
