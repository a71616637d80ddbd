"""Figures of a run. Each figure is a function that draws `Facts` into axes and returns False if the facts for it are missing.

Importing this module requires matplotlib.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from cbqstream.errors import UsageError
from cbqstream.report.facts import Facts
from cbqstream.runtime.memory import GIB

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as missing:
    raise UsageError("a report needs matplotlib. Install it: pip install 'cbqstream[report]'.") from missing

_INK = "#010203"
"""Placeholder for the color of text, which SVG takes from the page."""
_BEFORE, _AFTER, _THIRD = "#c2703d", "#2f8f6b", "#5b7fb8"  # visible on a white and on a dark page
_FEW_DECADES = 20
"""Ratio of the largest to the smallest loss on the axis below which ticks between powers of ten are labeled."""
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "cbqstream",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}


def _loss(facts: Facts, axes: Axes) -> bool:
    series = (
        ("before", _BEFORE, [window.loss_before for window in facts.windows]),
        ("after", _AFTER, [window.loss_after for window in facts.windows]),
    )
    for label, color, losses in series:
        axes.plot(facts.places, losses, ".-", label=label, color=color, linewidth=1)
    axes.set(xlabel="window", ylabel="loss", yscale="log")
    low, high = axes.get_ylim()
    # the default formatter writes powers as mathematics, which `text.parse_math` turns off
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if high < _FEW_DECADES * low else "")
    axes.legend()
    return bool(facts.windows)


def _changed(facts: Facts, axes: Axes) -> bool:
    axes.bar(facts.places, [100 * window.changed for window in facts.windows], color=_AFTER)
    axes.set(xlabel="window", ylabel="codes changed, %")
    return any(window.changed for window in facts.windows)


def _sqnr_db(facts: Facts, axes: Axes) -> bool:
    return _table(facts.sqnr_db(), axes, "dB")


def _smoothed(facts: Facts, axes: Axes) -> bool:
    return _table(facts.smoothed(), axes, "channels")


def _table(values: Mapping[str, Mapping[int, float]], axes: Axes, unit: str) -> bool:
    """Draw a table with a colored cell for each name and block.

    Args:
        values: values by name and block.
        axes: axes to draw into.
        unit: label of the color bar.
    """
    blocks = sorted({block for found in values.values() for block in found})
    if not blocks:
        return False
    cells = [[found.get(block, float("nan")) for block in blocks] for found in values.values()]
    extent = (blocks[0] - 0.5, blocks[-1] + 0.5, len(values) - 0.5, -0.5)
    image = axes.imshow(cells, aspect="auto", cmap="viridis", interpolation="nearest", extent=extent)
    axes.set_yticks(range(len(values)), list(values))
    axes.set(xlabel="block")
    axes.figure.colorbar(image, ax=axes, label=unit)
    return True


def _time(facts: Facts, axes: Axes) -> bool:
    costs = {window.index + 1: window.costs for window in facts.windows if window.costs is not None}
    parts = {
        "computing": [cost.seconds - cost.reading - cost.writing for cost in costs.values()],
        "reading": [cost.reading for cost in costs.values()],
        "writing": [cost.writing for cost in costs.values()],
    }
    below = [0.0] * len(costs)
    for (label, seconds), color in zip(parts.items(), (_AFTER, _THIRD, _BEFORE), strict=True):
        axes.bar(list(costs), seconds, bottom=below, label=label, color=color)
        below = [low + high for low, high in zip(below, seconds, strict=True)]
    axes.set(xlabel="window", ylabel="seconds")
    axes.legend()
    return bool(costs)


def _memory(facts: Facts, axes: Axes) -> bool:
    peaks = {window.index + 1: window.costs.peak_rss / GIB for window in facts.windows if window.costs is not None}
    axes.plot(list(peaks), list(peaks.values()), ".-", color=_THIRD, linewidth=1)
    axes.set(xlabel="window", ylabel="peak memory, GiB")
    axes.set_ylim(bottom=0)
    return bool(peaks)


def _epochs(facts: Facts, axes: Axes) -> bool:
    if not facts.epochs:
        return False
    values = [facts.epochs[0].loss_before, *(epoch.loss_after for epoch in facts.epochs)]
    axes.plot(range(len(values)), values, ".-", color=_AFTER, linewidth=1)
    axes.set_xticks(range(len(values)))
    axes.set(xlabel="epoch end to end", ylabel="divergence, nats")
    return True


FIGURES: Mapping[str, tuple[str, Callable[[Facts, Axes], bool]]] = MappingProxyType(
    {
        "loss": ("Loss of each window on held-out segments", _loss),
        "sqnr": ("Signal to quantization noise of the weights", _sqnr_db),
        "changed": ("Codes that changed from nearest", _changed),
        "smoothed": ("Channels that were rescaled", _smoothed),
        "epochs": ("Divergence from the predictions of the original model", _epochs),
        "time": ("Time of each window", _time),
        "memory": ("Peak memory of the process", _memory),
    }
)
"""Title and drawing function of each figure, by name."""


def figures(facts: Facts) -> Iterator[tuple[str, str, Figure]]:
    """Name, title and figure of each figure for which there are facts."""
    with mpl.rc_context(_STYLE):
        for name, (title, draw) in FIGURES.items():
            figure = Figure(figsize=(5.2, 2.9), layout="constrained")
            if draw(facts, figure.subplots()):
                yield name, title, figure


def as_svg(figure: Figure) -> str:
    """A figure as SVG for an HTML page, with a transparent background and text in the color of the page."""
    text = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )


def as_png(figure: Figure) -> bytes:
    """A figure as PNG with a white background."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, facecolor="white")
    return content.getvalue()
