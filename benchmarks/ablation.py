#!/usr/bin/env python3
"""Measure what each part of the method contributes on SmolLM2-135M: one switch at a time, compared with the range of seeds.

Usage: ablation.py MODEL WORK [--only PART ...] [--threads N] [--dry-run]

MODEL is the folder that tools/get_smollm2.py writes. Quantized models are kept in WORK. Blocks 10 to 13, where massive activations begin,
are quantized; all other blocks stay in full precision. Calibration: the first 32 x 512 tokens of data/c4-calibration.jsonl. Perplexity:
tokens 48 x 512 to 72 x 512 of the same file, which are not used for calibration. WikiText-2 is not used.

Rows that results/ablation.json contains are not measured again. The script prints a table, and draws results/ablation.png, which needs
matplotlib.
"""

import argparse
import re
import statistics
import sys
from pathlib import Path

from measure import CALIBRATION, Measured, cbqstream, cut_tokens, load, perplexity, save, window_reports

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "ablation.json"
KEEP_FIRST, KEEP_LAST, HELD_OUT = 10, 16, 24

GRIDS = {
    "W2A16 group 64, asymmetric": "--scheme W2A16 --group-size 64 --no-symmetric",
    "W4A16 per channel, asymmetric": "--scheme W4A16 --group-size -1 --no-symmetric",
    "W4A4 group 64, symmetric": "--scheme W4A4 --group-size 64",
}
"""Flags of each scheme."""
SEEDS = {"seed 1": "--seed 1", "seed 2": "--seed 2"}
SWITCHES = {
    "rounding nearest": "--rounding nearest",
    "rounding nearest, init minmax": "--rounding nearest --init minmax",
    "rounding lora_rounding": "--rounding lora_rounding",
    "init minmax": "--init minmax",
    "truncate weights": "--truncate-weights",
    "smoothing always, rule paper": "--smoothing always --smoothing-rule paper",
    "smoothing always, rule huawei": "--smoothing always --smoothing-rule huawei",
    "smoothing always, rule search": "--smoothing always --smoothing-rule search",
    "smoothing never": "--smoothing never",
    "smoothing never, rounding nearest": "--smoothing never --rounding nearest",
    "window 1": "--window-size 1 --overlap 0",
    "window 2, overlap 0": "--window-size 2 --overlap 0",
    "window 3, overlap 2": "--window-size 3 --overlap 2",
    "target mix 1": "--target-mix 1",
    "target mix 0.5": "--target-mix 0.5",
    "KL weight 0.1": "--kl-weight 0.1",
    "squared error as in the paper": "--token-balance 0 --channel-balance 0",
    "channel balance 0": "--channel-balance 0",
    "3 epochs": "--epochs 3",
    "12 epochs": "--epochs 12",
    "end-to-end stage, 2 epochs": "--end-to-end-epochs 2",
    "profile paper": "--profile paper",
}
"""Flags of each switch, added to those of a scheme."""
NOT_FOR = {
    "smoothing always, rule search": "W4A4",
    "smoothing never": "A16",
    "smoothing never, rounding nearest": "A16",
}
"""Switches that are the default of the schemes whose name contains the given text. They are left out there."""


def quantized_blocks(
    model: Path, work: Path, held_out: Path, name: str, flags: list[str], threads: int
) -> tuple[Measured, float, list[dict]]:
    """Quantize four blocks, and evaluate the result.

    Args:
        model: folder of the original model.
        work: folder for the quantized model.
        held_out: 24 segments of token ids for the perplexity.
        name: name of the row.
        flags: flags of `quantize`.
        threads: CPU threads.

    Returns:
        The process of `quantize`, the perplexity, and the reports of the windows.
    """
    out = work / re.sub(r"\W+", "-", name)
    log = out.with_suffix(".jsonl")
    common = ["--seq-len", "512", "--keep-first", str(KEEP_FIRST), "--keep-last", str(KEEP_LAST)]
    source = ["--dataset", str(CALIBRATION), "--log-json", str(log), "--threads", str(threads)]
    made = cbqstream("quantize", str(model), str(out), *common, *source, *flags)
    return made, held_out_perplexity(out, held_out, threads), window_reports(log)


def held_out_perplexity(model: Path, held_out: Path, threads: int) -> float:
    """Perplexity of a model over 24 segments of token ids."""
    options = ["--text", str(held_out), "--num-samples", str(HELD_OUT), "--threads", str(threads)]
    return perplexity(cbqstream("eval", str(model), *options))


def measure(model: Path, work: Path, held_out: Path, name: str, flags: list[str], threads: int) -> dict:
    """The figures of a row. See `quantized_blocks`."""
    flags = ["--num-samples", "32", *flags]
    made, found, windows = quantized_blocks(model, work, held_out, name, flags, threads)
    return {
        "perplexity": found,
        "seconds": made.seconds,
        "cpu_seconds": made.cpu_seconds,
        "changed": statistics.mean(window["changed"] for window in windows),
        "loss": windows[-1]["loss_after"],
        "threads": threads,
    }


def seed_perplexities(rows: dict[str, dict], grid: str) -> list[float]:
    """Perplexities of the default settings, one per seed."""
    names = [f"{grid} | default", *(f"{grid} | {seed}" for seed in SEEDS)]
    return [rows[name]["perplexity"] for name in names if name in rows]


def table(rows: dict[str, dict]) -> str:
    """The results as a Markdown table. CPU seconds are wall seconds in parentheses where only those were measured."""
    lines = [
        "| grid | switch | perplexity | against default | codes changed | CPU seconds (or wall) |",
        "|---|---|---|---|---|---|",
    ]
    for grid in GRIDS:
        seeds = seed_perplexities(rows, grid)
        if not seeds:
            continue
        center = statistics.mean(seeds)
        half = (max(seeds) - min(seeds)) / 2
        for switch in ["default", *SEEDS, *SWITCHES]:
            row = rows.get(f"{grid} | {switch}")
            if row is None:
                continue
            against = f"{row['perplexity'] / center - 1:+.1%}"
            if abs(row["perplexity"] - center) <= half and switch not in ("default", *SEEDS):
                against += " (within the seeds)"
            spent = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else f"({row['seconds']:.0f})"
            figures = f"{row['perplexity']:,.2f} | {against} | {row['changed']:.1%} | {spent}"
            lines.append(f"| {grid} | {switch} | {figures} |")
    return "\n".join(lines)


def draw(rows: dict[str, dict], path: Path) -> None:
    """Draw a panel of bars per scheme: the change against the default. The gray band is the range of the seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    grids = [
        grid
        for grid in GRIDS
        if any(f"{grid} | {switch}" in rows for switch in SWITCHES) and seed_perplexities(rows, grid)
    ]
    figure, axes = plt.subplots(1, len(grids), figsize=(6 * len(grids), 8), squeeze=False, layout="constrained")
    for grid, axis in zip(grids, axes[0], strict=True):
        seeds = seed_perplexities(rows, grid)
        center = statistics.mean(seeds)
        names = [switch for switch in SWITCHES if f"{grid} | {switch}" in rows]
        change = [100 * (rows[f"{grid} | {switch}"]["perplexity"] / center - 1) for switch in names]
        shown = [min(value, 40) for value in change]
        axis.barh(names, shown, color=["#2a7f62" if value < 0 else "#b5523b" for value in change])
        for position, value in enumerate(change):
            side, place = (4, "left") if value >= 0 else (-4, "right")
            end = (shown[position], position)
            axis.annotate(f"{value:+.1f}", end, xytext=(side, 0), textcoords="offset points", va="center", ha=place)
        low, high = ((100 * (value / center - 1)) for value in (min(seeds), max(seeds)))
        axis.axvspan(low, high, color="#888888", alpha=0.4, label="seeds")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlim(min([*shown, low]) - 8, max([*shown, high]) + 12)
        axis.set_title(f"{grid}\nmean of the default seeds {center:.2f}", fontsize=10)
        axis.set_xlabel("change of held-out perplexity, % (bars end at 40)")
        axis.invert_yaxis()
        axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the original model")
    parser.add_argument("work", type=Path, help="folder for quantized models")
    parser.add_argument("--only", nargs="+", default=[""], help="measure rows whose name contains one of these texts")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--dry-run", action="store_true", help="measure nothing; print and draw the stored results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for grid, grid_flags in GRIDS.items():
        for switch, flags in ({"default": ""} | SEEDS | SWITCHES).items():
            name = f"{grid} | {switch}"
            wanted = any(part in name for part in args.only) and not (switch in NOT_FOR and NOT_FOR[switch] in grid)
            if name in load(RESULTS) or not wanted or args.dry_run:
                continue
            print(name, file=sys.stderr, flush=True)
            held_out = cut_tokens(args.model, args.work / "held-out.npy", 48, 72)
            made = measure(args.model, args.work, held_out, name, [*grid_flags.split(), *flags.split()], args.threads)
            save(RESULTS, name, made)
    rows = load(RESULTS)
    print(table(rows))
    draw(rows, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
