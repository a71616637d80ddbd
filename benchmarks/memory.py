#!/usr/bin/env python3
"""Measure that peak resident memory does not grow with the number of blocks or with the number of samples.

Usage: memory.py WORK [--rows HIDDEN,BLOCKS,SAMPLES ...] [--results FILE]

Each random checkpoint (random_model.py) is quantized in a process of its own: W4A16 group 64, learned rounding from min-max scales, windows
of two blocks without overlap (min-max scales and no overlap save time, not memory), 64 random tokens per sample, one epoch, one thread.
The script prints peak resident memory and the size of the checkpoint.
"""

import argparse
import json
import shutil
from pathlib import Path

from measure import cbqstream
from random_model import ensure_checkpoint, random_tokens

HERE = Path(__file__).resolve().parent
VOCABULARY, SEQ_LEN = 1024, 64
ROWS = [(2048, 8, 4), (2048, 64, 4), (512, 4, 64), (512, 4, 512)]
"""Hidden size, blocks and samples of each row. Two rows that are compared follow each other."""


def measure(work: Path, hidden: int, blocks: int, samples: int) -> dict:
    """Quantize a random checkpoint, and return the row of results."""
    folder, out = work / f"model-{blocks}", work / f"out-{blocks}"
    tokens = random_tokens(work / "tokens.npy", VOCABULARY, samples * SEQ_LEN)
    size = ensure_checkpoint(folder, hidden=hidden, blocks=blocks, vocabulary=VOCABULARY)
    lengths = ["--num-samples", str(samples), "--seq-len", str(SEQ_LEN), "--epochs", "1"]
    method = ["--group-size", "64", "--init", "minmax", "--overlap", "0", "--threads", "1"]
    made = cbqstream("quantize", str(folder), str(out), "--dataset", str(tokens), *lengths, *method)
    for path in (folder, out, Path(f"{out}.run")):
        shutil.rmtree(path)
    sizes = {"hidden": hidden, "blocks": blocks, "samples": samples, "checkpoint": size}
    return {**sizes, "peak_rss": made.peak_rss, "seconds": made.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for checkpoints and results of the runs")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "memory.json", help="JSON file to write")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=ROWS,
        type=lambda text: tuple(map(int, text.split(","))),
        metavar="HIDDEN,BLOCKS,SAMPLES",
        help="hidden size (a multiple of 256), blocks and samples of each row",
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [measure(args.work, *row) for row in args.rows]
    args.results.parent.mkdir(exist_ok=True)
    args.results.write_text(json.dumps(rows, indent=1) + "\n")
    print("| hidden | blocks | samples | checkpoint, GiB | peak RSS, GiB | against the row above | seconds |")
    print("|---|---|---|---|---|---|---|")
    for index, row in enumerate(rows):
        against = f"{row['peak_rss'] / rows[index - 1]['peak_rss']:.3f}" if index % 2 else ""
        sizes = f"{row['hidden']} | {row['blocks']} | {row['samples']} | {row['checkpoint'] / 2**30:.2f}"
        print(f"| {sizes} | {row['peak_rss'] / 2**30:.2f} | {against} | {row['seconds']:.0f} |")


if __name__ == "__main__":
    main()
