#!/usr/bin/env python3
"""Every profile with every scheme on one window of the real SmolLM2-135M: nothing may be non-finite; how many codes each changes.

Usage: profiles.py MODEL WORK [--threads N]

MODEL is the folder that tools/get_smollm2.py writes; WORK keeps what is made on the way. Blocks 10 and 11 are quantized, calibrated on
16 x 256 tokens of data/c4-calibration.jsonl; perplexity is on tokens 48 x 512 to 56 x 512 of the same file. Writes results/profiles.json.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

from measure import CALIBRATION, cbqstream, cut_tokens, perplexity

from cbqstream.profiles import PROFILES

HERE = Path(__file__).resolve().parent
SCHEMES = ("W4A16", "W3A16", "W2A16", "W8A8", "W4A8", "W4A4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    held_out = cut_tokens(args.model, args.work / "held-out-8.npy", 48, 56)
    threads = ["--threads", str(args.threads)]
    rows = []
    print("| profile | scheme | loss | codes changed | perplexity | seconds |\n|---|---|---|---|---|---|", flush=True)
    for profile in PROFILES:
        for scheme in SCHEMES:
            out = args.work / f"{profile}-{scheme}"
            log = out.with_suffix(".jsonl")
            for old in (out, out.with_name(out.name + ".run")):
                shutil.rmtree(old, ignore_errors=True)
            log.unlink(missing_ok=True)
            data = ["--dataset", str(CALIBRATION), "--num-samples", "16", "--seq-len", "256", "--log-json", str(log)]
            blocks = ["--keep-first", "10", "--keep-last", "18"]
            chosen = ["--profile", profile, "--scheme", scheme, "--group-size", "64"]
            made = cbqstream("quantize", str(args.model), str(out), *chosen, *data, *blocks, *threads)
            said = cbqstream("eval", str(out), "--text", str(held_out), "--num-samples", "8", *threads)
            (window,) = (json.loads(line) for line in log.read_text().splitlines())
            row = {
                "profile": profile,
                "scheme": scheme,
                "loss_before": window["loss_before"],
                "loss_after": window["loss_after"],
                "changed": window["changed"],
                "perplexity": perplexity(said),
                "seconds": made.seconds,
            }
            assert all(math.isfinite(row[key]) for key in ("loss_before", "loss_after", "perplexity")), row
            assert row["loss_after"] <= row["loss_before"], row
            loss = f"{row['loss_before']:.4f} -> {row['loss_after']:.4f}"
            figures = f"{row['changed']:.2%} | {row['perplexity']:.2f} | {row['seconds']:.0f}"
            print(f"| {profile} | {scheme} | {loss} | {figures} |", flush=True)
            rows.append(row)
    (HERE / "results" / "profiles.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
