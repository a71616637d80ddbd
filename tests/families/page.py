#!/usr/bin/env python3
"""Write the results of the family tests with one version of transformers into the table of README.md.

Usage: page.py JUNIT_XML TRANSFORMERS_VERSION README

Columns of other versions of transformers, and the text around the table, are kept.
"""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
COLUMNS = {
    "test_streamed_logits_are_those_of_transformers": "logits",
    "test_streamed_perplexity_is_that_of_transformers": "perplexity",
    "test_smoothing_does_not_change_the_output_of_a_block": "smoothing",
    "test_transformers_loads_the_result_with_the_streamed_perplexity": "",
}
"""Column by name of the test. If it is empty, the second parameter of the test is the column."""


def outcomes(junit: Path) -> dict[str, dict[str, str]]:
    """Results by family and column: `yes` if the test passed and `NO` if it failed. Skipped tests are left out.

    Raises:
        SystemExit: no results of a test in `COLUMNS` are in the file, because it has another name now.
    """
    found: dict[str, dict[str, str]] = {}
    unseen = set(COLUMNS)
    for case in ElementTree.parse(junit).iter("testcase"):
        match = re.fullmatch(r"(\w+)\[(\w+?)(?:-(\w+))?\]", case.get("name", ""))
        if match is None or match[1] not in COLUMNS:
            continue
        unseen.discard(match[1])
        if case.find("skipped") is not None:
            continue
        passed = case.find("failure") is None and case.find("error") is None
        found.setdefault(match[2], {})[COLUMNS[match[1]] or match[3]] = "yes" if passed else "NO"
    if unseen:
        sys.exit(f"{junit}: no results of {', '.join(sorted(unseen))}. Name the test in COLUMNS as it is called now.")
    return found


def read_table(text: str) -> dict[str, dict[str, str]]:
    """Cells of a table in Markdown, by family and column heading."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines()]
    if not rows:
        return {}
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def main() -> None:
    """Replace the columns of the version in the table of the page."""
    junit, version, page = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    before, _, rest = page.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    cells = read_table(table)
    for family, columns in outcomes(junit).items():
        held = {name: value for name, value in cells.get(family, {}).items() if not name.startswith(f"{version}: ")}
        cells[family] = held | {f"{version}: {name}": value for name, value in columns.items()}
    names = ["logits", "perplexity", "smoothing", "W4A16", "W4A8"]
    versions = sorted(
        {name.partition(": ")[0] for row in cells.values() for name in row},
        key=lambda text: [*map(int, text.split("."))],
    )
    heads = [f"{other}: {name}" for other in versions for name in names]
    lines = ["| family | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    lines += [
        f"| {family} | " + " | ".join(row.get(head, "") for head in heads) + " |"
        for family, row in sorted(cells.items())
    ]
    page.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after)


if __name__ == "__main__":
    main()
