#!/usr/bin/env python3
"""Measure how the CPU time of a run grows with the number of blocks and of samples, and fit a straight line to each.

Usage: bench_e2e.py WORK [--hidden 512] [--threads 1] [--results FILE]

Random Llama-shaped checkpoints, W4A16 group 64, learned rounding, windows of two blocks that overlap by one, 128 tokens per sample, one
epoch. The number of blocks, and then the number of samples, is doubled from run to run. The fit is seconds = a + b * count by least
squares; the largest deviation from it is printed as a share of the measured seconds.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from measure import cbqstream
from random_model import ensure_checkpoint, random_tokens

HERE = Path(__file__).resolve().parent
SEQ_LEN, VOCABULARY = 128, 1024
SERIES = {"blocks": [(4, 16), (8, 16), (16, 16), (32, 16)], "samples": [(4, 16), (4, 32), (4, 64), (4, 128)]}
"""Blocks and samples of each run; one of the two is doubled in a series."""


def measure(work: Path, hidden: int, blocks: int, samples: int, threads: int) -> float:
    """CPU seconds of a run, divided by its number of threads."""
    folder, out = work / f"model-{blocks}", work / "out"
    ensure_checkpoint(folder, hidden=hidden, blocks=blocks, vocabulary=VOCABULARY)
    tokens = random_tokens(work / "tokens.npy", VOCABULARY, samples * SEQ_LEN)
    sizes = ["--num-samples", str(samples), "--seq-len", str(SEQ_LEN), "--group-size", "64", "--epochs", "1"]
    common = ["--dataset", str(tokens), "--threads", str(threads), "--device", "cpu"]
    made = cbqstream("quantize", str(folder), str(out), *common, *sizes)
    shutil.rmtree(out)
    shutil.rmtree(f"{out}.run")
    return made.cpu_seconds / threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for checkpoints and results of the runs")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the checkpoints, a multiple of 256")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "e2e.json", help="JSON file to write")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    known: dict[tuple[int, int], float] = {}
    results = {}
    for position, (name, sizes) in enumerate(SERIES.items()):
        for size in sizes:
            if size not in known:
                known[size] = measure(args.work, args.hidden, *size, args.threads)
        counts, times = [size[position] for size in sizes], [known[size] for size in sizes]
        slope, start = np.polyfit(counts, times, 1)
        largest = max(abs(start + slope * count - taken) / taken for count, taken in zip(counts, times, strict=True))
        results[name] = {
            "counts": counts,
            "seconds": times,
            "start": start,
            "slope": slope,
            "largest deviation": largest,
        }
        listed = ", ".join(f"{count}: {taken:.1f}" for count, taken in zip(counts, times, strict=True))
        print(f"{name}: CPU seconds {listed}; fit {start:.1f} + {slope:.2f} * {name}, largest deviation {largest:.1%}")
    args.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
