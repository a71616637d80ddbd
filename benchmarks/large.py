#!/usr/bin/env python3
"""The first windows of a model far larger than the machine, on the CPU, within a promise of memory; beside it what was planned.

Usage: large.py WORK [--shape llama-65b] [--max-ram 8GiB] [--windows 2] [--threads 2] [--results FILE]

Checkpoints of the shape of LLaMA 65B (80 blocks, 130 GB; learned rounding of low rank, 6 samples of 32 tokens) or of Qwen3-30B-A3B (48
blocks of 128 experts, 61 GB; one value per weight, 16 samples of 256 tokens), of which the first blocks have random weights and the others
are zeros that take no disk. W4A16 group 128, one epoch, stopped after some windows.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from measure import cbqstream, save
from random_model import random_tokens, written

HERE = Path(__file__).resolve().parent
SHAPES = {
    "llama-65b": ({"hidden": 8192, "inner": 22016, "blocks": 80, "vocabulary": 32000}, "lora_rounding", 6, 32),
    "qwen3-30b-a3b": (
        {
            "hidden": 2048,
            "inner": 768,
            "experts": 128,
            "heads": 32,
            "key_value_heads": 4,
            "blocks": 48,
            "vocabulary": 151936,
        },
        "signround",
        16,
        256,
    ),
}
"""Sizes, the mode of learned rounding, samples and their length."""
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-65b")
    parser.add_argument("--max-ram", default="8GiB")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "large.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    sizes, rounding, samples, seq_len = SHAPES[args.shape]
    folder, out = args.work / args.shape, args.work / "out"
    size = written(folder, **sizes, real=args.windows + 1)
    tokens = random_tokens(args.work / "tokens.npy", sizes["vocabulary"], samples * seq_len)
    lengths = ["--num-samples", str(samples), "--seq-len", str(seq_len), "--epochs", "1", "--rounding", rounding]
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
        "cpu_seconds": made.cpu_seconds,
        "planned_ram": plan["ram_total"],
        "offload": plan["offload"],
        "peak_rss": made.peak_rss,
        "seconds": made.seconds,
        "plan_seconds": planned.seconds,
    }
    save(args.results, f"{args.shape}, {args.max_ram}", row)
    print(
        f"{args.shape}, checkpoint {size / GIB:.1f} GiB, --max-ram {args.max_ram}: planned {plan['ram_total'] / GIB:.2f} GiB, taken",
        end=" ",
    )
    print(f"{made.peak_rss / GIB:.2f} GiB; {args.windows} windows in {made.seconds:.0f} s")


if __name__ == "__main__":
    main()
