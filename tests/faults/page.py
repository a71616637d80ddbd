#!/usr/bin/env python3
"""Write the counts of the fault tests into the table of README.md. The text around the table is kept.

Usage: page.py TALLY README
"""

import json
import sys
from pathlib import Path

BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def table(lines: list[str]) -> str:
    """The table in Markdown, with a line for each kind of fault.

    Args:
        lines: tallies in JSON. If a test was run several times, its last tally counts.
    """
    latest = {(counts["test"], counts["row"], counts["what"]): counts for counts in map(json.loads, lines)}
    merged: dict[tuple[int, str], dict] = {}
    for counts in latest.values():
        key = (counts["row"], counts["what"])
        held = merged.setdefault(key, {**counts, "runs": 0, "faults": 0, "seconds": 0})
        if counts["redone"] is not None:
            held["redone"] = max(held["redone"] or 0, counts["redone"])
        for name in ("runs", "faults", "seconds"):
            held[name] += counts[name]
    rows = [
        f"| {row} | {what} | {held['runs']:,} | {held['faults']:,} | {held['lost']}"
        f" | {'' if held['redone'] is None else held['redone']} | {held['seconds']:.0f} |"
        for (row, what), held in sorted(merged.items())
    ]
    total = [sum(held[name] for held in merged.values()) for name in ("runs", "faults")]
    rows.append(
        f"| | all | {total[0]:,} | {total[1]:,} | 0 | | {sum(held['seconds'] for held in merged.values()):.0f} |"
    )
    head = "| row | fault | runs | faults | results lost | windows repeated, at most | seconds |\n|---|---|---|---|---|---|---|"
    return "\n".join([head, *rows]) + "\n"


def main() -> None:
    """Replace the table of the page."""
    tally, page = map(Path, sys.argv[1:])
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(before + BEGIN + table(tally.read_text().splitlines()) + END + after)


if __name__ == "__main__":
    main()
