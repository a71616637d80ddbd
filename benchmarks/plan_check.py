#!/usr/bin/env python3
"""What `cbqstream plan` says beside what the run then takes: peak resident memory, disk at its fullest, time.

Usage: plan_check.py WORK [--only PART ...] [--plan-again] [--threads 1] [--results FILE]

Random Llama-shaped checkpoints, quantized whole; roundings max_shift little, or every window of such a model would be reverted and nothing
would be carried over. The space of the run directory and of the output is looked at every 20 ms, links counted
once. Time is that of the process on its cores (user and system), and so is the plan's where nothing else runs; the plan is made first.
"""

import argparse
import json
import os
import shutil
import threading
from pathlib import Path

from measure import cbqstream, load, save
from random_model import random_tokens, written

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


class Space:
    """The most that some folders held while this was entered, in bytes."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders
        self.most = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Space":
        self._thread.start()
        return self

    def __exit__(self, *what: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            held: dict[int, int] = {}
            for top in self.folders:
                for folder, _, files in os.walk(top):
                    for file in files:
                        try:
                            status = (Path(folder) / file).stat()
                        except FileNotFoundError:
                            continue
                        held[status.st_ino] = status.st_size
            self.most = max(self.most, sum(held.values()))


def measured(work: Path, model: dict, flags: list[str], threads: int, before: dict | None) -> dict:
    """The plan of a run, and the run; or what it took `before`."""
    folder = work / "-".join(f"{key}{value}" for key, value in model.items())
    written(folder, **model)
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
    building = list(out.parent.glob(f"{out.name}.*"))
    with Space([Path(f"{out}.run"), out, *building]) as space:
        made = cbqstream("quantize", str(folder), str(out), "--dataset", str(tokens), *common)
    taken = {"ram": made.peak_rss, "disk": space.most, "seconds": made.cpu_seconds / threads}
    return {name: [total, taken[name]] for name, total in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--plan-again", action="store_true", help="hold another plan against the runs that are known")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "plan.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for name, (model, flags) in RUNS.items():
        if any(part in name for part in args.only):
            before = load(args.results).get(name) if args.plan_again else None
            save(args.results, name, measured(args.work, model, flags, args.threads, before))
    print("| run | memory, GiB: plan, run | ratio | disk, MiB: plan, run | ratio | seconds: plan, run | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, row in load(args.results).items():
        cells = []
        for part, unit in (("ram", 1 << 30), ("disk", 1 << 20), ("seconds", 1)):
            said, seen = row[part]
            cells += [f"{said / unit:.2f}, {seen / unit:.2f}", f"{said / seen:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
