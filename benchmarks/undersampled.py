#!/usr/bin/env python3
"""Compare what helps experts that see few calibration tokens: more text, statistics from all tokens, or codes in closed form.

Usage: undersampled.py MODEL WORK [--experts 16] [--only PART ...] [--threads N] [--dry-run] [--results FILE]

MODEL is the folder that tools/get_smollm2.py writes. mixture_model.py makes a mixture from it whose random router chooses two experts for a
token. Blocks 10 to 13 are quantized with `--experts alone`, W3A16 group 64, asymmetric; all other blocks stay in full precision.
Calibration: the first 2, 8 or 32 x 512 tokens of data/c4-calibration.jsonl. Perplexity: tokens 48 x 512 to 72 x 512 of the same file, which
are not used for calibration. WikiText-2 is not used.

Rows that the result file contains are not measured again. --only takes parts of `segments | method | seed`.
"""

import argparse
import sys
from pathlib import Path

from ablation import HELD_OUT, held_out_perplexity, quantized_blocks
from measure import cut_tokens, load, run, save

HERE = Path(__file__).resolve().parent
GRID = "--scheme W3A16 --group-size 64 --no-symmetric --experts alone --window-size 1 --overlap 0"
SEGMENTS, SEEDS = (2, 8, 32), (0, 1)
METHODS = {
    "trained": "",
    "trained, all experts": "--calibrate-all-experts",
    "gptq": "--rounding gptq",
    "nearest": "--rounding nearest",
    "nearest, all experts": "--rounding nearest --calibrate-all-experts",
}
"""Flags of each method. With all experts, starting scales are found from the tokens of all of them."""


def measure(mixture: Path, work: Path, held_out: Path, name: str, flags: list[str], threads: int) -> dict:
    """The figures of a row. See `quantized_blocks`."""
    made, found, reports = quantized_blocks(mixture, work, held_out, name, flags, threads)
    tokens = [count for report in reports for counts in report["experts"].values() for count in counts]
    return {
        "perplexity": found,
        "cpu_seconds": made.cpu_seconds,
        "undersampled": sum(len(report["undersampled"]) for report in reports),
        "experts": len(tokens),
        "fewest": min(tokens),
        "threads": threads,
    }


def table(rows: dict[str, dict]) -> str:
    """The results as a Markdown table, with the mean and the range of the seeds."""
    lines = [
        "| segments of 512 | method | perplexity (seeds) | against full precision | undersampled layers | fewest tokens | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    full = rows.get("full precision", {}).get("perplexity")
    for segments in SEGMENTS:
        for method in METHODS:
            names = (f"{segments} | {method} | seed {seed}" for seed in SEEDS)
            found = [rows[name] for name in names if name in rows]
            if not found or full is None:
                continue
            values = [row["perplexity"] for row in found]
            mean, first = sum(values) / len(values), found[0]
            each = f" ({', '.join(f'{value:.2f}' for value in values)})" if len(values) > 1 else ""
            lines.append(
                f"| {segments} | {method} | {mean:.2f}{each} | {mean / full - 1:+.1%} | {first['undersampled']}"
                f" of {3 * first['experts']} | {first['fewest']} | {first['cpu_seconds']:.0f} |"
            )
    return "\n".join([*lines, "", f"full precision: {full}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the original model, a Llama")
    parser.add_argument("work", type=Path, help="folder for the mixture and quantized models")
    parser.add_argument("--experts", type=int, default=16, help="experts per block")
    parser.add_argument("--only", nargs="+", default=[""], help="run rows whose name contains one of these texts")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--dry-run", action="store_true", help="list the missing rows, and print the table")
    default = HERE / "results" / "undersampled.json"
    parser.add_argument("--results", type=Path, default=default, help="JSON file for the rows")
    args = parser.parse_args()
    names = {
        f"{segments} | {method} | seed {seed}": f"{GRID} {flags} --num-samples {segments} --seed {seed}".split()
        for segments in SEGMENTS
        for method, flags in METHODS.items()
        for seed in (SEEDS if method.startswith("trained") else SEEDS[:1])
    }
    missing = [name for name in names if any(part in name for part in args.only) and name not in load(args.results)]
    if args.dry_run:
        print(*missing, sep="\n", file=sys.stderr)
    elif missing:
        args.work.mkdir(parents=True, exist_ok=True)
        mixture = args.work / "mixture"
        if not (mixture / "config.json").exists():
            script = str(HERE / "mixture_model.py")
            run(sys.executable, script, str(args.model), str(mixture), "--experts", str(args.experts))
        held_out = cut_tokens(args.model, args.work / "held-out.npy", 48, 48 + HELD_OUT)
        if "full precision" not in load(args.results):
            save(args.results, "full precision", {"perplexity": held_out_perplexity(mixture, held_out, args.threads)})
        for name in missing:
            print(name, file=sys.stderr, flush=True)
            save(args.results, name, measure(mixture, args.work, held_out, name, names[name], args.threads))
    print(table(load(args.results)))


if __name__ == "__main__":
    main()
