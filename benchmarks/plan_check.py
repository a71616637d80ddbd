#!/usr/bin/env python3
"""Compare the plan of a run with the run itself: peak resident memory, highest use of disk space, time.

Usage: plan_check.py WORK [--only PART ...] [--plan-again] [--threads 1] [--results FILE]

Random Llama-shaped checkpoints are quantized as a whole. --max-shift is small, because otherwise the training of every window of such a
model would be reverted and no window state would be stored. The size of the run directory and of the output is read every 20 ms; hard links
are counted once. The time of a run is CPU time (user and system) divided by the number of threads. The plan is computed first; its time is
comparable if no other program runs.
"""

import argparse
import json
import os
import shutil
import threading
from pathlib import Path

from measure import cbqstream, load, save
from random_model import ensure_checkpoint, random_tokens

HERE = Path(__file__).resolve().parent
RUNS: dict[str, tuple[dict, list[str]]] = {
    "512 wide, 6 blocks, 16 x 256, W4": ({"blocks": 6, "hidden": 512}, ["--num-samples", "16", "--seq-len", "256"]),
    "1024 wide, 4 blocks, 8 x 256, W2 asymmetric": (
        {"blocks": 4, "hidden": 1024},
        ["--num-samples", "8", "--seq-len", "256", "--scheme", "W2A16", "--no-symmetric"],
    ),
    "1024 wide, 4 blocks, 16 x 256, W4A8, batch 8": (
        {"blocks": 4, "hidden": 1024},
        ["--num-samples", "16", "--seq-len", "256", "--scheme", "W4A8", "--batch-size", "8", "--epochs", "3"],
    ),
    "768 wide, vocabulary 65536, 4 blocks, 8 x 256, W4": (
        {"blocks": 4, "hidden": 768, "vocabulary": 65536},
        ["--num-samples", "8", "--seq-len", "256", "--epochs", "3"],
    ),
    "2048 wide, 3 blocks, 8 x 64, W3": (
        {"blocks": 3, "hidden": 2048},
        ["--num-samples", "8", "--seq-len", "64", "--scheme", "W3A16", "--epochs", "3"],
    ),
    "512 wide, 6 blocks, windows of three, 16 x 512, W4": (
        {"blocks": 6, "hidden": 512},
        ["--num-samples", "16", "--seq-len", "512", "--window-size", "3", "--overlap", "2", "--epochs", "2"],
    ),
    "512 wide, 6 blocks, 64 x 256, W4 per channel": (
        {"blocks": 6, "hidden": 512},
        ["--num-samples", "64", "--seq-len", "256", "--group-size", "-1", "--epochs", "2"],
    ),
}


class DiskUse:
    """Largest total size in bytes of a result, its run directory and the folder in which it is built, while the context is active."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.largest = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "DiskUse":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.largest = max(self.largest, self._total())

    def _total(self) -> int:
        sizes: dict[int, int] = {}
        for top in [self.out, *self.out.parent.glob(f"{self.out.name}.*")]:
            for folder, _, files in os.walk(top):
                for file in files:
                    try:
                        status = (Path(folder) / file).stat()
                    except FileNotFoundError:
                        continue
                    sizes[status.st_ino] = status.st_size
        return sum(sizes.values())


def measure(work: Path, model: dict, flags: list[str], threads: int, before: dict | None) -> dict:
    """Planned and measured memory (bytes), disk space (bytes) and time (seconds) of a run.

    Args:
        work: folder for the checkpoint and the run.
        model: sizes of the checkpoint.
        flags: flags of `quantize` and `plan`.
        threads: CPU threads.
        before: an earlier row, whose measurements are used instead of a new run.
    """
    folder = work / "-".join(f"{key}{value}" for key, value in model.items())
    ensure_checkpoint(folder, **model)
    size, length = (int(flags[flags.index(name) + 1]) for name in ("--num-samples", "--seq-len"))
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = random_tokens(work / "tokens.npy", vocabulary, size * length)
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(f"{out}.run", ignore_errors=True)
    grid = [] if "--group-size" in flags else ["--group-size", "64"]
    common = [*flags, *grid, "--max-shift", "0.05", "--threads", str(threads), "--device", "cpu"]
    plan = json.loads(cbqstream("plan", str(folder), "--json", *common).output)
    totals = {"ram": plan["ram_total"], "disk": plan["disk_total"], "seconds": plan["seconds_total"]}
    if before is not None:
        return {name: [total, before[name][1]] for name, total in totals.items()}
    with DiskUse(out) as use:
        made = cbqstream("quantize", str(folder), str(out), "--dataset", str(tokens), *common)
    taken = {"ram": made.peak_rss, "disk": use.largest, "seconds": made.cpu_seconds / threads}
    return {name: [total, taken[name]] for name, total in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for checkpoints and runs")
    parser.add_argument("--only", nargs="+", default=[""], help="measure rows whose name contains one of these texts")
    parser.add_argument("--plan-again", action="store_true", help="compute new plans, and keep the stored measurements")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "plan.json", help="JSON file for the rows")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for name, (model, flags) in RUNS.items():
        if any(part in name for part in args.only):
            before = load(args.results).get(name) if args.plan_again else None
            save(args.results, name, measure(args.work, model, flags, args.threads, before))
    print("| run | memory, GiB: plan, run | ratio | disk, MiB: plan, run | ratio | seconds: plan, run | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, row in load(args.results).items():
        cells = []
        for part, unit in (("ram", 1 << 30), ("disk", 1 << 20), ("seconds", 1)):
            planned, measured = row[part]
            cells += [f"{planned / unit:.2f}, {measured / unit:.2f}", f"{planned / measured:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
