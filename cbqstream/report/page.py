"""One self-contained HTML page: the facts of a run, its figures, and a table of its windows."""

import json
from collections.abc import Iterable, Sequence
from html import escape

from cbqstream.report.facts import Facts

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #ffffff; --line: #d5d9de; --soft: #5c656f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --paper: #14171a; --line: #363c43; --soft: #9aa4af; } }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 70rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 0 0 .3rem; font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; margin: 1.5rem 0; }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 400; } .windows td, .windows th { text-align: right; white-space: nowrap; }
pre { overflow-x: auto; font-size: .85rem; } summary { cursor: pointer; margin: 1rem 0 .5rem; }
"""


def page(facts: Facts, pictures: Iterable[tuple[str, str]]) -> str:
    """The page as HTML.

    Args:
        facts: facts of the run.
        pictures: title and SVG of each figure.
    """
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.rows())
    drawn = "".join(f"<figure><h2>{escape(title)}</h2>{svg}</figure>" for title, svg in pictures)
    parts = [f"<h1>{escape(facts.name)}</h1><table>{rows}</table>", f'<div class="figures">{drawn}</div>']
    if facts.windows:
        parts.append(_folded("Windows", f'<div class="wide"><table class="windows">{_windows(facts)}</table></div>'))
    if facts.recipe is not None:
        parts.append(_folded("Settings", f"<pre>{escape(facts.recipe)}</pre>"))
    if facts.identity is not None:
        parts.append(_folded("Identity", f"<pre>{escape(json.dumps(facts.identity.to_dict(), indent=1))}</pre>"))
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>{escape(facts.name)}</title><style>{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}{title}</head><body>{"".join(parts)}</body></html>\n'


def _folded(title: str, content: str) -> str:
    """A section that is closed until its title is clicked."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _windows(facts: Facts) -> str:
    """Rows of the table of windows."""
    measured = any(window.costs is not None for window in facts.windows)
    times = ["seconds", "reading", "writing"] if measured else []
    lines = [_line("th", ["window", "blocks", "loss before", "loss after", "changed", *times, "reverted"])]
    for window in facts.windows:
        losses = [f"{loss:.4g}" for loss in (window.loss_before, window.loss_after)]
        cost = window.costs
        spent = [] if cost is None else [f"{value:.1f}" for value in (cost.seconds, cost.reading, cost.writing)]
        blocks, changed = f"{window.start}-{window.stop - 1}", f"{window.changed:.2%}"
        lines.append(_line("td", [str(window.index + 1), blocks, *losses, changed, *spent, window.reverted or ""]))
    return "".join(lines)


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
