"""Pictures of a run: each draws `Facts` into axes, or says that there is nothing to draw. Importing this needs matplotlib."""

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
"""Stands for the colour of text, which is that of the page."""
_BEFORE, _AFTER, _THIRD = "#c2703d", "#2f8f6b", "#5b7fb8"  # seen on white and on near black
_FEW_DECADES = 20
"""Of the largest and the smallest loss: up to there the ticks between powers of ten have numbers too."""
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
    for key, label, color in (("loss_before", "before", _BEFORE), ("loss_after", "after", _AFTER)):
        axes.plot(facts.places, [window[key] for window in facts.windows], ".-", label=label, color=color, linewidth=1)
    axes.set(xlabel="window", ylabel="loss", yscale="log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")  # by default powers are written in mathematics, which names must not be
    axes.yaxis.set_minor_formatter("{x:g}" if high < _FEW_DECADES * low else "")
    axes.legend()
    return bool(facts.windows)


def _changed(facts: Facts, axes: Axes) -> bool:
    axes.bar(facts.places, [100 * window["changed"] for window in facts.windows], color=_AFTER)
    axes.set(xlabel="window", ylabel="codes changed, %")
    return any(window["changed"] for window in facts.windows)


def _sqnr_db(facts: Facts, axes: Axes) -> bool:
    return _table(facts.sqnr_db(), axes, "dB")


def _scales(facts: Facts, axes: Axes) -> bool:
    return _table(facts.scales(), axes, "channels")


def _table(values: Mapping[str, Mapping[int, float]], axes: Axes, unit: str) -> bool:
    """A cell for each name and block."""
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
    if not facts.costs:
        return False
    parts = {
        "computing": [window["seconds"] - window["reading"] - window["writing"] for window in facts.windows],
        "reading": [window["reading"] for window in facts.windows],
        "writing": [window["writing"] for window in facts.windows],
    }
    below = [0.0] * len(facts.places)
    for (label, seconds), color in zip(parts.items(), (_AFTER, _THIRD, _BEFORE), strict=True):
        axes.bar(facts.places, seconds, bottom=below, label=label, color=color)
        below = [low + high for low, high in zip(below, seconds, strict=True)]
    axes.set(xlabel="window", ylabel="seconds")
    axes.legend()
    return True


def _memory(facts: Facts, axes: Axes) -> bool:
    if not facts.costs:
        return False
    axes.plot(facts.places, [window["peak_rss"] / GIB for window in facts.windows], ".-", color=_THIRD, linewidth=1)
    axes.set(xlabel="window", ylabel="peak memory, GiB")
    axes.set_ylim(bottom=0)
    return True


def _epochs(facts: Facts, axes: Axes) -> bool:
    if not facts.epochs:
        return False
    values = [facts.epochs[0]["loss_before"], *(epoch["loss_after"] for epoch in facts.epochs)]
    axes.plot(range(len(values)), values, ".-", color=_AFTER, linewidth=1)
    axes.set_xticks(range(len(values)))
    axes.set(xlabel="epoch end to end", ylabel="divergence, nats")
    return True


FIGURES: Mapping[str, tuple[str, Callable[[Facts, Axes], bool]]] = MappingProxyType(
    {
        "loss": ("Loss of each window on segments that nothing learns from", _loss),
        "sqnr_db": ("Signal to noise of the weights", _sqnr_db),
        "changed": ("Codes that moved away from the nearest", _changed),
        "scales": ("Channels that were rescaled for their outliers", _scales),
        "epochs": ("Divergence from the original model's predictions", _epochs),
        "time": ("Time of each window, and what it went to", _time),
        "memory": ("Highest memory of the process so far", _memory),
    }
)
"""By name: the title, and who draws."""


def figures(facts: Facts) -> Iterator[tuple[str, str, Figure]]:
    """Name, title and figure of all that can be drawn."""
    with mpl.rc_context(_STYLE):
        for name, (title, draw) in FIGURES.items():
            figure = Figure(figsize=(5.2, 2.9), layout="constrained")
            if draw(facts, figure.subplots()):
                yield name, title, figure


def as_svg(figure: Figure) -> str:
    """For a page: transparent, and its text in the colour of the page's."""
    text = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )


def as_png(figure: Figure) -> bytes:
    """On white."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, facecolor="white")
    return content.getvalue()
