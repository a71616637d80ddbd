#!/usr/bin/env python3
"""This project beside its peers: one model, the same tokens, the same evaluation, one after the other on one machine.

Usage: compare.py MODEL WORK --autoround PYTHON --llmcompressor PYTHON [--threads N] [--only PART ...] [--dry-run]

MODEL is the folder that tools/get_smollm2.py writes; WORK keeps the quantized models. PYTHON is the interpreter of a virtual environment
that holds the peer: auto-round 0.16.1, llmcompressor 0.14.0. Calibration: the first 32 x 512 tokens of data/c4-calibration.jsonl.
Perplexity: 64 x 512 tokens spread evenly over WikiText-2 test and validation, by plain transformers for the peers and by
`cbqstream eval` for ours (they agree to four digits: accuracy.py).
Cells that results/compare.json holds are not run again. --only takes parts of `row | method`.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from measure import CALIBRATION, cbqstream, cut_tokens, load, perplexity, run, save

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "compare.json"
TEXTS = [HERE / "data" / "wikitext2-test.txt", HERE / "data" / "wikitext2-validation.txt"]
SAMPLES, LENGTH = 32, 512


@dataclass(frozen=True)
class Grid:
    """What a row asks of every program."""

    scheme: str
    group_size: int
    symmetric: bool

    def peer(self) -> list[str]:
        """For the peers' scripts."""
        weights, activations = re.fullmatch(r"W(\d+)A(\d+)", self.scheme).groups()
        flags = ["--bits", weights, "--act-bits", activations, "--group-size", str(self.group_size)]
        return flags if self.symmetric else [*flags, "--asymmetric"]

    def ours(self) -> list[str]:
        """For `cbqstream quantize`."""
        flags = ["--scheme", self.scheme, "--group-size", str(self.group_size)]
        return [*flags, "--symmetric" if self.symmetric else "--no-symmetric"]


ROWS = {
    "W4A16 per channel, asymmetric": Grid("W4A16", -1, False),
    "W4A16 per channel, symmetric": Grid("W4A16", -1, True),
    "W3A16 group 64, asymmetric": Grid("W3A16", 64, False),
    "W2A16 group 64, asymmetric": Grid("W2A16", 64, False),
    "W4A8 group 64, symmetric": Grid("W4A8", 64, True),
    "W4A4 group 64, symmetric": Grid("W4A4", 64, True),
}
PEERS = {
    "GPTQ": ["gptq"],
    "auto-round, 50 iterations": ["autoround", "--iters", "50"],
    "auto-round, 200 iterations": ["autoround", "--iters", "200"],
    "auto-round, 200 iterations, alg_ext": ["autoround", "--iters", "200", "--alg-ext"],
}
OURS = {
    "round-to-nearest": [
        "--rounding",
        "nearest",
        "--init",
        "minmax",
        "--cfp-activations",
        "never",
        "--num-samples",
        "1",
        "--seq-len",
        "64",
    ],
    "cbqstream fast": ["--profile", "fast"],
    "cbqstream": ["--profile", "default"],
    "cbqstream, seed 1": ["--profile", "default", "--seed", "1"],
    "cbqstream accurate": ["--profile", "accurate"],
}
"""Round-to-nearest looks at the weights alone, so any text will do."""
ONLY_AT_2_BITS = "auto-round, 200 iterations, alg_ext"


def peer_cell(python: Path, method: list[str], grid: Grid, model: Path, tokens: Path, threads: int) -> dict:
    """Run a peer in its own environment."""
    script = HERE / f"peer_{method[0]}.py"
    texts = [str(text) for text in TEXTS]
    made = run(
        str(python), str(script), str(model), str(tokens), *texts, *grid.peer(), *method[1:], "--threads", str(threads)
    )
    return json.loads(made.output.strip().splitlines()[-1])


def our_cell(method: list[str], grid: Grid, model: Path, out: Path, threads: int) -> dict:
    """Quantize with this project, and measure what it wrote."""
    log = out.with_suffix(".jsonl")
    sizes = ["--num-samples", str(SAMPLES), "--seq-len", str(LENGTH), "--threads", str(threads)]
    source = ["--dataset", str(CALIBRATION), "--log-json", str(log)]
    made = cbqstream("quantize", str(model), str(out), *grid.ours(), *sizes, *source, *method)
    windows = [line for line in map(json.loads, log.read_text().splitlines()) if "window" in line]
    cell = {
        "seconds": made.seconds,
        "cpu_seconds": made.cpu_seconds,
        "peak_rss": made.peak_rss,
        "changed": sum(window["changed"] for window in windows) / len(windows),
    }
    for text in TEXTS:
        said = cbqstream("eval", str(out), "--text", str(text), "--threads", str(threads))
        cell[text.stem] = perplexity(said)
    return cell


def table(cells: dict[str, dict]) -> str:
    """The results as Markdown: perplexity on test and validation, seconds, GiB."""
    lines = [
        "| grid | method | WikiText-2 test | validation | seconds | CPU seconds | peak RSS, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        for method in [*OURS, *PEERS]:
            cell = cells.get(f"{row} | {method}")
            if cell is None:
                continue
            figures = " | ".join(f"{cell[text.stem]:,.2f}" for text in TEXTS)
            times = (
                f"{cell['seconds']:.0f} | {cell['cpu_seconds']:.0f}"
                if "cpu_seconds" in cell
                else f"{cell['seconds']:.0f} |"
            )
            lines.append(f"| {row} | {method} | {figures} | {times} | {cell['peak_rss'] / 2**30:.2f} |")
    return "\n".join(lines)


def summary(cells: dict[str, dict]) -> str:
    """A line a grid: perplexity on WikiText-2 test, and CPU minutes of the slower programs (wall time where those were not taken). Empty
    where nothing was run."""
    methods = ["round-to-nearest", *PEERS, *(name for name in OURS if name != "round-to-nearest")]
    held = [method for method in methods if any(f"{row} | {method}" in cells for row in ROWS)]
    lines = ["| | " + " | ".join(held) + " |", "|---" * (len(held) + 1) + "|"]
    for row in ROWS:
        figures = []
        for method in held:
            cell = cells.get(f"{row} | {method}")
            quick = cell is None or method in ("round-to-nearest", "GPTQ")
            minutes = "" if quick else f" ({cell.get('cpu_seconds', cell['seconds']) / 60:.0f} min)"
            figures.append("" if cell is None else f"{cell[TEXTS[0].stem]:,.2f}{minutes}")
        lines.append(f"| {row} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--autoround", type=Path)
    parser.add_argument("--llmcompressor", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--dry-run", action="store_true", help="say what is missing, and print the table")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    tokens = cut_tokens(args.model, args.work / "calibration.npy", 0, SAMPLES)
    pythons = {"autoround": args.autoround, "gptq": args.llmcompressor}
    for row, grid in ROWS.items():
        for method, flags in (PEERS | OURS).items():
            name = f"{row} | {method}"
            wanted = any(part in name for part in args.only) and (method != ONLY_AT_2_BITS or "W2" in row)
            if name in load(RESULTS) or not wanted:
                continue
            print(name, file=sys.stderr, flush=True)
            if args.dry_run:
                continue
            if method in PEERS:
                cell = peer_cell(pythons[flags[0]], flags, grid, args.model, tokens, args.threads)
            else:
                out = args.work / re.sub(r"\W+", "-", name)
                cell = our_cell(flags, grid, args.model, out, args.threads)
            save(RESULTS, name, {**cell, "threads": args.threads})
    print(table(load(RESULTS)))
    print()
    print(summary(load(RESULTS)))


if __name__ == "__main__":
    main()
