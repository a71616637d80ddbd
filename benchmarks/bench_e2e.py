#!/usr/bin/env python3
"""How the cost of a run grows with the number of blocks and of samples: CPU seconds where each is doubled, and a straight line.

Usage: bench_e2e.py WORK [--hidden 512] [--threads 1] [--results FILE]

Random Llama-shaped checkpoints, W4A16 group 64, learned rounding, overlapping windows of two blocks, 128 tokens a sample, one epoch.
The fit is seconds = a + b * count by least squares; what is left over is printed as a share of the seconds.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from measure import cbqstream
from random_model import random_tokens, written

HERE = Path(__file__).resolve().parent
SEQ_LEN, VOCABULARY = 128, 1024
SERIES = {"blocks": [(4, 16), (8, 16), (16, 16), (32, 16)], "samples": [(4, 16), (4, 32), (4, 64), (4, 128)]}
"""(blocks, samples) of each run; one of the two is doubled."""


def seconds(work: Path, hidden: int, blocks: int, samples: int, threads: int) -> float:
    """CPU seconds of a run, over its threads."""
    folder, out = work / f"model-{blocks}", work / "out"
    written(folder, hidden=hidden, blocks=blocks, vocabulary=VOCABULARY)
    tokens = random_tokens(work / "tokens.npy", VOCABULARY, samples * SEQ_LEN)
    sizes = ["--num-samples", str(samples), "--seq-len", str(SEQ_LEN), "--group-size", "64", "--epochs", "1"]
    made = cbqstream(
        "quantize",
        str(folder),
        str(out),
        "--dataset",
        str(tokens),
        *sizes,
        "--threads",
        str(threads),
        "--device",
        "cpu",
    )
    shutil.rmtree(out)
    shutil.rmtree(f"{out}.run")
    return made.cpu_seconds / threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "e2e.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    known: dict[tuple[int, int], float] = {}
    results = {}
    for position, (name, sizes) in enumerate(SERIES.items()):
        for size in sizes:
            if size not in known:
                known[size] = seconds(args.work, args.hidden, *size, args.threads)
        counts, times = [size[position] for size in sizes], [known[size] for size in sizes]
        slope, start = np.polyfit(counts, times, 1)
        left = max(abs(start + slope * count - taken) / taken for count, taken in zip(counts, times, strict=True))
        results[name] = {"counts": counts, "seconds": times, "start": start, "slope": slope, "largest deviation": left}
        listed = ", ".join(f"{count}: {taken:.1f}" for count, taken in zip(counts, times, strict=True))
        print(f"{name}  {listed}  = {start:.1f} + {slope:.2f} * {name}, off by {left:.1%} at most")
    args.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
