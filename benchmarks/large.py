#!/usr/bin/env python3
"""The first windows of a model far larger than the machine, on the CPU, within a promise of memory; beside it what was planned.

Usage: large.py WORK [--max-ram 8GiB] [--windows 2] [--threads 2] [--results FILE]

A checkpoint of the shape of LLaMA 65B (80 blocks, 130 GB), of which the first blocks have random weights and the others are zeros that
take no disk. W4A16 group 128, learned rounding of low rank, one epoch on 6 samples of 32 tokens, stopped after some windows.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from measure import cbqstream
from random_model import random_tokens, written

HERE = Path(__file__).resolve().parent
SHAPE = {"hidden": 8192, "inner": 22016, "blocks": 80, "vocabulary": 32000}
SAMPLES, SEQ_LEN = 6, 32
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--max-ram", default="8GiB")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "large.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    folder, out = args.work / "model", args.work / "out"
    size = written(folder, **SHAPE, real=args.windows + 1)
    tokens = random_tokens(args.work / "tokens.npy", SHAPE["vocabulary"], SAMPLES * SEQ_LEN)
    lengths = ["--num-samples", str(SAMPLES), "--seq-len", str(SEQ_LEN), "--epochs", "1", "--rounding", "lora"]
    common = [*lengths, "--device", "cpu", "--threads", str(args.threads), "--max-ram", args.max_ram]
    planned = cbqstream("plan", str(folder), "--json", *common)
    plan = json.loads(planned.output)
    stop = ["--stop-after-window", str(args.windows)]
    made = cbqstream("quantize", str(folder), str(out), "--dataset", str(tokens), *common, *stop, expect=75)
    shutil.rmtree(f"{out}.run")
    row = {
        "checkpoint": size,
        "max_ram": args.max_ram,
        "windows": args.windows,
        "threads": args.threads,
        "cores": os.cpu_count(),
        "planned_ram": plan["ram_total"],
        "peak_rss": made.peak_rss,
        "seconds": made.seconds,
        "plan_seconds": planned.seconds,
    }
    args.results.write_text(json.dumps(row, indent=1) + "\n")
    print(
        f"checkpoint {size / GIB:.1f} GiB, --max-ram {args.max_ram}: planned {plan['ram_total'] / GIB:.2f} GiB, taken",
        end=" ",
    )
    print(f"{made.peak_rss / GIB:.2f} GiB; {args.windows} windows in {made.seconds:.0f} s")


if __name__ == "__main__":
    main()
