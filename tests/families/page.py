#!/usr/bin/env python3
"""Write the results of the family tests, of all architectures or of published models into the tables of README.md.

Usage: page.py JUNIT_XML|RESULTS_JSONL TRANSFORMERS_VERSION README

The results are those with one version of transformers. In the table of families, columns of other versions are kept. The tables of
architectures and of published models are replaced.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
BEGIN_ARCHITECTURES, END_ARCHITECTURES = "<!-- architectures -->\n", "<!-- end of architectures -->\n"
BEGIN_PUBLISHED, END_PUBLISHED = "<!-- published -->\n", "<!-- end of published -->\n"
PUBLISHED_COLUMNS = ("storage", "evaluate", "quantize", "resume", "load")
OUTCOMES = ("right", "refused", "not buildable", "wrong", "traceback", "refused late", "check failed")
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


def family_table(text: str, junit: Path, version: str) -> list[str]:
    """Lines of the table of families: those of a page, with the columns of one version of transformers replaced."""
    cells = read_table(text)
    for family, columns in outcomes(junit).items():
        held = {name: value for name, value in cells.get(family, {}).items() if not name.startswith(f"{version}: ")}
        cells[family] = held | {f"{version}: {name}": value for name, value in columns.items()}
    names = ["logits", "perplexity", "smoothing", "W4A16", "W4A8"]
    versions = sorted(
        {name.partition(": ")[0] for row in cells.values() for name in row},
        key=lambda text: [*map(int, text.split("."))],
    )
    heads = [f"{other}: {name}" for other in versions for name in names]
    rows = [
        f"| {family} | " + " | ".join(row.get(head, "") for head in heads) + " |"
        for family, row in sorted(cells.items())
    ]
    return ["| family | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|", *rows]


def architecture_table(results: Path, version: str) -> list[str]:
    """Counts and table of the results of `tools/architectures.py`. The last result of a type counts."""
    records = {record["type"]: record for record in map(json.loads, results.read_text().splitlines())}
    counts = Counter(record["outcome"] for record in records.values())
    summary = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES)
    lines = [f"transformers {version}, {len(records)} architectures: {summary}.", ""]
    lines += ["| type | outcome | share of block weights quantized | message |", "|---|---|---|---|"]
    for name, record in sorted(records.items()):
        share = record.get("quantized")
        message = record["line"].replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {name} | {record['outcome']} | {'' if share is None else f'{share:.0%}'} | {message} |")
    return lines


def published_table(records: Iterable[dict[str, str]]) -> list[str]:
    """Table of the results of `tools/published.py`."""
    lines = [f"| model | {' | '.join(PUBLISHED_COLUMNS)} | remark |", "|---" * (len(PUBLISHED_COLUMNS) + 2) + "|"]
    for record in records:
        remark = record["line"].replace("|", "\\|").replace("<", "&lt;")
        cells = (record["type"], *(record.get(column, "") for column in PUBLISHED_COLUMNS), remark)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Replace a table of the page, or the columns of one version in it."""
    results, version, page = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    begin, end = BEGIN, END
    if results.suffix == ".jsonl":
        records = [json.loads(line) for line in results.read_text().splitlines()]
        is_published = any("storage" in record for record in records)
        begin, end = (BEGIN_PUBLISHED, END_PUBLISHED) if is_published else (BEGIN_ARCHITECTURES, END_ARCHITECTURES)
    before, _, rest = page.read_text().partition(begin)
    table, _, after = rest.partition(end)
    if begin == BEGIN_PUBLISHED:
        last = {record["type"]: record for record in records}
        rows = sorted(last.values(), key=lambda record: record["type"].casefold())
        lines = [f"transformers {version}, {len(last)} models.", "", *published_table(rows)]
    elif begin == BEGIN_ARCHITECTURES:
        lines = architecture_table(results, version)
    else:
        lines = family_table(table, results, version)
    page.write_text(before + begin + "\n".join(lines) + "\n" + end + after)


if __name__ == "__main__":
    main()
