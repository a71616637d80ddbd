#!/usr/bin/env python3
"""Measure accuracy, time and memory on SmolLM2-135M, of round-to-nearest and of cbqstream.

Usage: accuracy.py MODEL WORK [--only NAME ...]

MODEL is the folder that tools/get_smollm2.py writes. Quantized models are kept in WORK. Calibration: the first 32 x 512 tokens of
data/c4-calibration.jsonl. Perplexity: 64 x 512 tokens spread evenly over data/wikitext2-test.txt, computed by `cbqstream eval` and,
independently, by plain transformers. Rows that results/accuracy.json contains are not run again. An interrupted row resumes.
"""

import argparse
import re
import sys
from pathlib import Path

from measure import CALIBRATION, cbqstream, load, perplexity, run, save, window_reports

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "accuracy.json"
TEXT = HERE / "data" / "wikitext2-test.txt"

GRIDS = {
    "W2A16 group 64, asymmetric, first 4 blocks": "--scheme W2A16 --group-size 64 --no-symmetric --keep-last 26",
    "W2A16 group 64, asymmetric": "--scheme W2A16 --group-size 64 --no-symmetric",
    "W3A16 group 64, asymmetric": "--scheme W3A16 --group-size 64 --no-symmetric",
    "W4A16 group 64, symmetric, 3 epochs": "--scheme W4A16 --group-size 64 --epochs 3",
}
"""Flags of each scheme."""
METHODS = {
    "round-to-nearest": "--rounding nearest --init minmax --num-samples 1 --seq-len 64",
    "cbqstream": "--num-samples 32 --seq-len 512",
}
"""Flags of each method. Round-to-nearest with min-max scales depends on the weights alone, so one short calibration segment is enough."""


def evaluate(folder: Path, *, dequantize: bool) -> dict[str, float]:
    """Perplexity of a model folder, streamed and by plain transformers.

    Args:
        folder: folder of the model.
        dequantize: let transformers dequantize the weights when it loads them, which asymmetric weights need.
    """
    streamed = cbqstream("eval", str(folder), "--text", str(TEXT))
    options = ["--dequantize"] if dequantize else []
    plain = run(sys.executable, str(HERE / "plain_perplexity.py"), str(folder), str(TEXT), *options)
    return {
        "perplexity": perplexity(streamed),
        "plain": perplexity(plain),
        "eval_seconds": streamed.seconds,
        "eval_rss": streamed.peak_rss,
    }


def measure(model: Path, work: Path, name: str, flags: list[str]) -> dict:
    """Quantize a model with the given flags, and evaluate the result."""
    out = work / re.sub(r"\W+", "-", name)
    log = out.with_suffix(".jsonl")
    made = cbqstream("quantize", str(model), str(out), "--dataset", str(CALIBRATION), "--log-json", str(log), *flags)
    windows = window_reports(log)
    return {
        "seconds": made.seconds,
        "window_seconds": sum(window["costs"]["seconds"] for window in windows),
        "peak_rss": made.peak_rss,
        "changed": sum(window["changed"] for window in windows) / len(windows),
        **evaluate(out, dequantize="--no-symmetric" in flags),
    }


def table(rows: dict[str, dict]) -> str:
    """The results as a Markdown table."""
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
    parser.add_argument("model", type=Path, help="folder of the original model")
    parser.add_argument("work", type=Path, help="folder for quantized models")
    parser.add_argument("--only", nargs="+", default=[""], help="measure rows whose name contains one of these texts")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for method_name, method in METHODS.items():
        for grid_name, grid in GRIDS.items():
            name = f"{grid_name} | {method_name}"
            if name in load(RESULTS) or not any(part in name for part in args.only):
                continue
            print(name, file=sys.stderr, flush=True)
            save(RESULTS, name, measure(args.model, args.work, name, [*grid.split(), *method.split()]))
    if "full precision | " not in load(RESULTS):
        save(RESULTS, "full precision | ", evaluate(args.model, dequantize=False))
    print(table(load(RESULTS)))


if __name__ == "__main__":
    main()
