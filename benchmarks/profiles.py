#!/usr/bin/env python3
"""Run every profile with every scheme on one window of SmolLM2-135M, and check that all losses and perplexities are finite.

Usage: profiles.py MODEL WORK [--only PART ...] [--threads N] [--dry-run]

MODEL is the folder that tools/get_smollm2.py writes. Quantized models are kept in WORK. Blocks 10 and 11 are quantized, calibrated on
16 x 256 tokens of data/c4-calibration.jsonl; the perplexity is over tokens 48 x 512 to 56 x 512 of the same file. Rows that
results/profiles.json contains are not measured again. --only takes parts of `profile | scheme`.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

from measure import CALIBRATION, cbqstream, cut_tokens, load, perplexity, save, window_reports

from cbqstream.profiles import PROFILES

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "profiles.json"
SCHEMES = ("W4A16", "W3A16", "W2A16", "W8A8", "W4A8", "W4A4")


def measure(model: Path, work: Path, held_out: Path, profile: str, scheme: str, threads: list[str]) -> dict:
    """Quantize one window, and evaluate the result.

    Raises:
        SystemExit: a loss or the perplexity is not finite, or the loss of the window increased.
    """
    out = work / f"{profile}-{scheme}"
    log = out.with_suffix(".jsonl")
    for old in (out, out.with_name(out.name + ".run")):
        shutil.rmtree(old, ignore_errors=True)
    log.unlink(missing_ok=True)
    data = ["--dataset", str(CALIBRATION), "--num-samples", "16", "--seq-len", "256", "--log-json", str(log)]
    blocks = ["--keep-first", "10", "--keep-last", "18"]
    chosen = ["--profile", profile, "--scheme", scheme, "--group-size", "64"]
    made = cbqstream("quantize", str(model), str(out), *chosen, *data, *blocks, *threads)
    evaluated = cbqstream("eval", str(out), "--text", str(held_out), "--num-samples", "8", *threads)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (window,) = window_reports(log)
    row = {
        **{name: window[name] for name in ("loss_before", "loss_after", "changed")},
        "divergence": [line["loss_after"] for line in lines if "epoch" in line],
        "perplexity": perplexity(evaluated),
        "cpu_seconds": made.cpu_seconds,
    }
    values = [row["loss_before"], row["loss_after"], row["perplexity"], *row["divergence"]]
    if not all(map(math.isfinite, values)) or row["loss_after"] > row["loss_before"]:
        raise SystemExit(f"{profile} | {scheme}: {row}")
    return row


def table(rows: dict[str, dict]) -> str:
    """The results as a Markdown table."""
    lines = ["| profile | scheme | loss | codes changed | perplexity | CPU seconds |", "|---|---|---|---|---|---|"]
    for profile in PROFILES:
        for scheme in SCHEMES:
            row = rows.get(f"{profile} | {scheme}")
            if row is not None:
                loss = f"{row['loss_before']:.4f} -> {row['loss_after']:.4f}"
                figures = f"{row['changed']:.2%} | {row['perplexity']:.2f} | {row['cpu_seconds']:.0f}"
                lines.append(f"| {profile} | {scheme} | {loss} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the original model")
    parser.add_argument("work", type=Path, help="folder for quantized models")
    parser.add_argument("--only", nargs="+", default=[""], help="measure rows whose name contains one of these texts")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--dry-run", action="store_true", help="measure nothing; print the stored results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    threads = ["--threads", str(args.threads)]
    for profile in PROFILES:
        for scheme in SCHEMES:
            name = f"{profile} | {scheme}"
            if args.dry_run or name in load(RESULTS) or not any(part in name for part in args.only):
                continue
            print(name, file=sys.stderr, flush=True)
            held_out = cut_tokens(args.model, args.work / "held-out-8.npy", 48, 56)
            save(RESULTS, name, measure(args.model, args.work, held_out, profile, scheme, threads))
    print(table(load(RESULTS)))


if __name__ == "__main__":
    main()
