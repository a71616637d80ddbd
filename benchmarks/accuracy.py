#!/usr/bin/env python3
"""Accuracy, time and memory on the real SmolLM2-135M: round-to-nearest against this project.

Usage: accuracy.py MODEL WORK [--only NAME ...]

MODEL is the folder that tools/get_smollm2.py writes; WORK keeps the quantized models. Calibration: the first 32 x 512 tokens of
data/c4-calibration.jsonl. Perplexity: 64 x 512 tokens spread evenly over data/wikitext2-test.txt, streamed by `cbqstream eval` and,
independently, by plain transformers. Rows that results/accuracy.json holds already are not run again; an interrupted row goes on.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from measure import cbqstream, perplexity, run

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "accuracy.json"
TEXT = HERE / "data" / "wikitext2-test.txt"
CALIBRATION = ("--dataset", str(HERE / "data" / "c4-calibration.jsonl"), "--num-samples", "32", "--seq-len", "512")
NEAREST = (
    "--rounding",
    "nearest",
    "--init",
    "minmax",
    "--dataset",
    CALIBRATION[1],
    "--num-samples",
    "1",
    "--seq-len",
    "64",
)
"""Min-max scales of the weights alone: the calibration text does not matter."""

GRIDS = {
    "W2A16 group 64, asymmetric, first 4 blocks": (
        "--scheme",
        "W2A16",
        "--group-size",
        "64",
        "--no-symmetric",
        "--keep-last",
        "26",
    ),
    "W2A16 group 64, asymmetric": ("--scheme", "W2A16", "--group-size", "64", "--no-symmetric"),
    "W3A16 group 64, asymmetric": ("--scheme", "W3A16", "--group-size", "64", "--no-symmetric"),
    "W4A16 group 64, symmetric, 3 epochs": ("--scheme", "W4A16", "--group-size", "64", "--epochs", "3"),
}
METHODS = {"round-to-nearest": NEAREST, "cbqstream": CALIBRATION}


def evaluate(folder: Path, *, dequantize: bool) -> dict[str, float]:
    """Perplexity of a folder, streamed and by plain transformers."""
    streamed = cbqstream("eval", str(folder), "--text", str(TEXT))
    options = ["--dequantize"] if dequantize else []
    plain = run(sys.executable, str(HERE / "plain_perplexity.py"), str(folder), str(TEXT), *options)
    return {
        "perplexity": perplexity(streamed),
        "plain": perplexity(plain),
        "eval_seconds": streamed.seconds,
        "eval_rss": streamed.peak_rss,
    }


def load() -> dict[str, dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def save(rows: dict[str, dict]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def row(model: Path, work: Path, name: str, grid: tuple[str, ...], method: tuple[str, ...]) -> dict:
    """Quantize and evaluate."""
    out = work / re.sub(r"\W+", "-", name)
    log = out.with_suffix(".jsonl")
    made = cbqstream("quantize", str(model), str(out), *grid, *method, "--log-json", str(log))
    windows = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        "seconds": made.seconds,
        "window_seconds": sum(window["seconds"] for window in windows),
        "peak_rss": made.peak_rss,
        "changed": sum(window["changed"] for window in windows) / len(windows),
        **evaluate(out, dequantize="--no-symmetric" in grid),
    }


def table(rows: dict[str, dict]) -> str:
    """The results as Markdown."""
    lines = [
        "| grid | method | perplexity | plain transformers | seconds | peak RSS, GiB |",
        "|---|---|---|---|---|---|",
    ]
    names = ["full precision | ", *(f"{grid} | {method}" for grid in GRIDS for method in METHODS)]
    for name in names:
        values = rows.get(name)
        if values is None:
            continue
        grid, _, method = name.partition(" | ")
        seconds = f"{values['seconds']:.0f}" if "seconds" in values else ""
        rss = f"{values['peak_rss'] / 2**30:.2f}" if "peak_rss" in values else ""
        lines.append(
            f"| {grid} | {method} | {values['perplexity']:,.2f} | {values['plain']:,.2f} | {seconds} | {rss} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", default=[""], help="grids or methods whose name holds one of these")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = load()
    for method_name, method in METHODS.items():
        for grid_name, grid in GRIDS.items():
            name = f"{grid_name} | {method_name}"
            if name in rows or not any(part in name for part in args.only):
                continue
            print(name, file=sys.stderr, flush=True)
            rows = {**load(), name: row(args.model, args.work, name, grid, method)}
            save(rows)
    if "full precision | " not in rows:
        rows["full precision | "] = evaluate(args.model, dequantize=False)
        save(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
