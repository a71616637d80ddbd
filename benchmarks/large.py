#!/usr/bin/env python3
"""Quantize the first windows of a model far larger than memory, on the CPU with a memory limit, and compare with the plan.

Usage: large.py WORK [--shape llama-65b] [--max-ram 8GiB] [--windows 2] [--threads 2] [--results FILE]

Checkpoints of the shape of LLaMA 65B (80 blocks, 130 GB; lora_rounding, 6 samples of 32 tokens) or of Qwen3-30B-A3B (48 blocks of 128
experts, 61 GB; signround, 16 samples of 256 tokens). The first blocks have random weights; the others are zeros that take no disk space.
W4A16 group 128, one epoch, stopped after some windows.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from measure import cbqstream, save
from random_model import ensure_checkpoint, random_tokens

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
"""Sizes of the model, rounding method, number of samples, and tokens in a sample."""
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the checkpoint and the run")
    parser.add_argument("--shape", choices=SHAPES, default="llama-65b", help="shape of the model")
    parser.add_argument("--max-ram", default="8GiB", help="memory limit of the run")
    parser.add_argument("--windows", type=int, default=2, help="number of windows")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "large.json", help="JSON file for the row")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    sizes, rounding, samples, seq_len = SHAPES[args.shape]
    folder, out = args.work / args.shape, args.work / "out"
    size = ensure_checkpoint(folder, **sizes, real=args.windows + 1)
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
        "offload": plan["memory_mode"]["offload"],
        "peak_rss": made.peak_rss,
        "seconds": made.seconds,
        "plan_seconds": planned.seconds,
    }
    save(args.results, f"{args.shape}, {args.max_ram}", row)
    memory = f"planned {plan['ram_total'] / GIB:.2f} GiB, measured {made.peak_rss / GIB:.2f} GiB"
    print(f"{args.shape}, checkpoint {size / GIB:.1f} GiB, --max-ram {args.max_ram}: {memory}")
    print(f"{args.windows} windows in {made.seconds:.0f} s")


if __name__ == "__main__":
    main()
