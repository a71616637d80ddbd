#!/usr/bin/env python3
"""Compare cbqstream with GPTQ and auto-round: same model, calibration tokens, evaluation and hardware, one run at a time.

Usage: compare.py MODEL WORK --autoround PYTHON --llmcompressor PYTHON [--threads N] [--only PART ...] [--dry-run]

MODEL is the folder that tools/get_smollm2.py writes. Quantized models are kept in WORK. PYTHON is the interpreter of a virtual environment
with the other program: auto-round 0.16.1, llmcompressor 0.14.0 (GPTQ). Calibration: the first 32 x 512 tokens of data/c4-calibration.jsonl.
Perplexity: 64 x 512 tokens spread evenly over WikiText-2 test and validation, by plain transformers for the other programs and by
`cbqstream eval` for cbqstream (the two agree to four digits, see accuracy.py).

Cells that results/compare.json contains are not run again. --only takes parts of `row | method`.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from measure import CALIBRATION, cbqstream, cut_tokens, load, perplexity, run, save, window_reports

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "compare.json"
TEXTS = [HERE / "data" / "wikitext2-test.txt", HERE / "data" / "wikitext2-validation.txt"]
SAMPLES, LENGTH = 32, 512


@dataclass(frozen=True)
class Grid:
    """Format of the quantized layers in a row of the table."""

    scheme: str
    group_size: int
    symmetric: bool

    def peer_flags(self) -> list[str]:
        """Flags of the peer scripts."""
        weights, activations = re.fullmatch(r"W(\d+)A(\d+)", self.scheme).groups()
        flags = ["--bits", weights, "--act-bits", activations, "--group-size", str(self.group_size)]
        return flags if self.symmetric else [*flags, "--asymmetric"]

    def own_flags(self) -> list[str]:
        """Flags of `cbqstream quantize`."""
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
    "GPTQ": "gptq",
    "auto-round, 50 iterations": "autoround --iters 50",
    "auto-round, 200 iterations": "autoround --iters 200",
    "auto-round, 200 iterations, alg_ext": "autoround --iters 200 --alg-ext",
}
"""Name and flags of the peer script of each method."""
OWN = {
    "round-to-nearest": "--rounding nearest --init minmax --smoothing never --num-samples 1 --seq-len 64",
    "cbqstream quick": "--profile quick",
    "cbqstream fast": "--profile fast",
    "cbqstream": "--profile default",
    "cbqstream, seed 1": "--profile default --seed 1",
    "cbqstream accurate": "--profile accurate",
}
"""Flags of each method of this project. Round-to-nearest depends on the weights alone, so one short calibration segment is enough."""
ONLY_AT_2_BITS = "auto-round, 200 iterations, alg_ext"


def peer_cell(python: Path, script: str, flags: list[str], model: Path, tokens: Path) -> dict:
    """Run a peer script in its own environment, and return what it reports."""
    texts = [str(text) for text in TEXTS]
    made = run(str(python), str(HERE / f"peer_{script}.py"), str(model), str(tokens), *texts, *flags)
    return json.loads(made.output.strip().splitlines()[-1])


def perplexities(folder: Path, texts: list[Path], threads: int) -> dict[str, float]:
    """Perplexity of a model over each text, by the name of its file without the suffix."""
    flags = ["--threads", str(threads)]
    return {text.stem: perplexity(cbqstream("eval", str(folder), "--text", str(text), *flags)) for text in texts}


def own_cell(flags: list[str], model: Path, out: Path, threads: int, texts: list[Path] = TEXTS) -> dict:
    """Quantize with this project, and evaluate the result.

    Args:
        flags: flags of `quantize`; they take precedence over those that are the same for all cells.
        model: folder of the original model.
        out: folder to create.
        threads: CPU threads.
        texts: texts for the perplexity.
    """
    log = out.with_suffix(".jsonl")
    sizes = ["--num-samples", str(SAMPLES), "--seq-len", str(LENGTH), "--threads", str(threads)]
    source = ["--dataset", str(CALIBRATION), "--log-json", str(log)]
    made = cbqstream("quantize", str(model), str(out), *sizes, *source, *flags)
    windows = window_reports(log)
    return {
        "seconds": made.seconds,
        "cpu_seconds": made.cpu_seconds,
        "peak_rss": made.peak_rss,
        "changed": sum(window["changed"] for window in windows) / len(windows),
        **perplexities(out, texts, threads),
    }


def table(cells: dict[str, dict]) -> str:
    """The results as a Markdown table: perplexity on test and validation, seconds, GiB."""
    lines = [
        "| grid | method | WikiText-2 test | validation | seconds | CPU seconds | peak RSS, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        for method in [*OWN, *PEERS]:
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
    """The results as a Markdown table with a row per grid: perplexity on WikiText-2 test, and minutes of the slower programs.

    Minutes are CPU time, or wall time where CPU time was not measured. A cell that was not run is empty.
    """
    methods = ["round-to-nearest", *PEERS, *(name for name in OWN if name != "round-to-nearest")]
    measured = [method for method in methods if any(f"{row} | {method}" in cells for row in ROWS)]
    lines = ["| | " + " | ".join(measured) + " |", "|---" * (len(measured) + 1) + "|"]
    for row in ROWS:
        figures = []
        for method in measured:
            cell = cells.get(f"{row} | {method}")
            quick = cell is None or method in ("round-to-nearest", "GPTQ")
            minutes = "" if quick else f" ({cell.get('cpu_seconds', cell['seconds']) / 60:.0f} min)"
            figures.append("" if cell is None else f"{cell[TEXTS[0].stem]:,.2f}{minutes}")
        lines.append(f"| {row} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the original model")
    parser.add_argument("work", type=Path, help="folder for quantized models")
    parser.add_argument("--autoround", type=Path, metavar="PYTHON", help="interpreter with auto-round")
    parser.add_argument("--llmcompressor", type=Path, metavar="PYTHON", help="interpreter with llmcompressor")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--only", nargs="+", default=[""], help="run cells whose name contains one of these texts")
    parser.add_argument("--dry-run", action="store_true", help="list the missing cells, and print the tables")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pythons = {"autoround": args.autoround, "gptq": args.llmcompressor}
    for row, grid in ROWS.items():
        for method, flags in (PEERS | OWN).items():
            name = f"{row} | {method}"
            wanted = any(part in name for part in args.only) and (method != ONLY_AT_2_BITS or "W2" in row)
            if name in load(RESULTS) or not wanted:
                continue
            print(name, file=sys.stderr, flush=True)
            if args.dry_run:
                continue
            if method in PEERS:
                script, *own = flags.split()
                if pythons[script] is None:
                    parser.error(f"{name} needs --autoround and --llmcompressor; or leave it out with --only")
                tokens = cut_tokens(args.model, args.work / "calibration.npy", 0, SAMPLES)
                given = [*grid.peer_flags(), *own, "--threads", str(args.threads)]
                cell = peer_cell(pythons[script], script, given, args.model, tokens)
            else:
                out = args.work / re.sub(r"\W+", "-", name)
                cell = own_cell([*grid.own_flags(), *flags.split()], args.model, out, args.threads)
            save(RESULTS, name, {**cell, "threads": args.threads})
    print(table(load(RESULTS)))
    print()
    print(summary(load(RESULTS)))


if __name__ == "__main__":
    main()
