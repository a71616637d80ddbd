#!/usr/bin/env python3
"""Compare experts that are trained alone with experts that are trained with their window, and with GPTQ.

Usage: experts_alone.py MODEL WORK [--threads N] [--only PART ...] [--profile default] [--num-samples 32] [--seq-len 512] [--blocks N]
                        [--dry-run] [--results FILE]

MODEL is the folder that tools/get_smollm2.py writes. equivalent_mixture.py makes a mixture of eight experts from it that computes the same,
so the rows of the dense model show what the division into experts changes. Quantized models are kept in WORK. Calibration: the first 32 x
512 tokens of data/c4-calibration.jsonl. Perplexity: 64 x 512 tokens spread evenly over the last 100 of the 200 documents of that file, over
WikiText-2 validation and over WikiText-2 test, which is for the final figure and not for tuning. With --blocks, only the first blocks are
quantized, and only the held-out C4 text is evaluated.

Cells that results/experts_alone.json contains are not run again. --only takes parts of `grid | settings | model | method`, such as
`W3A16` or `mixture | experts alone`.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from compare import LENGTH, SAMPLES, TEXTS, Grid, own_cell, perplexities
from measure import CALIBRATION, load, run, save

HERE = Path(__file__).resolve().parent
EXPERTS = 8
DOCUMENTS, CALIBRATION_TOKENS = 100, 48 * 512
"""Held-out documents at the end of the C4 text, and the largest number of calibration tokens, which end far before them."""
GRIDS = {
    "W4A16 group 64, symmetric": Grid("W4A16", 64, True),
    "W3A16 group 64, asymmetric": Grid("W3A16", 64, False),
    "W2A16 group 64, asymmetric": Grid("W2A16", 64, False),
}
ONE = "--window-size 1 --overlap 0"
GPTQ = f"--rounding gptq {ONE}"
METHODS = {
    "mixture | experts with their window": "--experts window",
    "mixture | experts in windows of one block": f"--experts window {ONE}",
    "mixture | experts alone": f"--experts alone {ONE}",
    "mixture | GPTQ": GPTQ,
    "mixture | GPTQ, experts alone": f"--experts alone {GPTQ}",
    "mixture | round-to-nearest": "--rounding nearest",
    "dense | trained": "",
    "dense | GPTQ": GPTQ,
    "dense | round-to-nearest": "--rounding nearest",
}
"""Flags of each method, by model and name. Round-to-nearest has the scales that the search finds."""
BASIS = "mixture | experts with their window"
"""Model and method that ratios refer to."""


def prepare(model: Path, work: Path) -> tuple[dict[str, Path], list[Path]]:
    """Write the mixture and the held-out C4 text, if they do not exist.

    Args:
        model: folder of the dense model.
        work: folder for the files.

    Returns:
        Folders of the models by name, and the texts for the perplexity.
    """
    work.mkdir(parents=True, exist_ok=True)
    mixture, held_out = work / "mixture", work / "c4.jsonl"
    if not (mixture / "config.json").exists():
        # in a process of its own, because the peak memory of a child process starts at that of its parent
        script = str(HERE / "equivalent_mixture.py")
        run(sys.executable, script, str(model), str(mixture), "--experts", str(EXPERTS))
    documents = CALIBRATION.read_text().strip().split("\n")
    held_out.write_text("\n".join(documents[-DOCUMENTS:]))
    return {"mixture": mixture, "dense": model}, [held_out, *reversed(TEXTS)]


def table(cells: dict[str, dict], settings: str) -> str:
    """The results as a Markdown table: perplexities, their ratios to the experts that are trained with their window, minutes, GiB."""
    texts = {"c4": "C4", **{text.stem: text.stem.replace("wikitext2-", "WikiText-2 ") for text in reversed(TEXTS)}}
    if "blocks" in settings:
        texts = {"c4": texts["c4"]}
    columns = [part for title in texts.values() for part in (title, "ratio")]
    lines = [
        f"| grid | model | method | {' | '.join(columns)} | minutes | CPU minutes | peak RSS, GiB |",
        "|---" * (len(columns) + 6) + "|",
    ]
    full = cells.get("full precision")
    for grid in GRIDS:
        basis = cells.get(f"{grid} | {settings} | {BASIS}")
        found = {name: cells.get(f"{grid} | {settings} | {name}") for name in METHODS}
        for name, cell in {**found, "dense | full precision": full if any(found.values()) else None}.items():
            if cell is None:
                continue
            figures = []
            for text in texts:
                ratio = "" if basis is None else f"{cell[text] / basis[text]:.4f}"
                figures += [f"{cell[text]:,.2f}", ratio]
            if "seconds" in cell:
                times = [f"{cell[part] / 60:.1f}" for part in ("seconds", "cpu_seconds")]
                figures += [*times, f"{cell['peak_rss'] / 2**30:.2f}"]
            else:
                figures += ["", "", ""]
            lines.append(f"| {grid} | {name} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the original model, a Llama")
    parser.add_argument("work", type=Path, help="folder for the mixture and quantized models")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--only", nargs="+", default=[""], help="run cells whose name contains one of these texts")
    parser.add_argument("--profile", default="default", help="profile of cbqstream")
    parser.add_argument("--num-samples", type=int, default=SAMPLES, help="calibration segments")
    parser.add_argument("--seq-len", type=int, default=LENGTH, help="tokens in a segment")
    parser.add_argument("--blocks", type=int, help="quantize only the first N blocks, and evaluate on C4 alone")
    parser.add_argument("--dry-run", action="store_true", help="list the missing cells, and print the table")
    default = HERE / "results" / "experts_alone.json"
    parser.add_argument("--results", type=Path, default=default, help="JSON file for the cells")
    args = parser.parse_args()
    if args.num_samples * args.seq_len > CALIBRATION_TOKENS:
        parser.error(f"use at most {CALIBRATION_TOKENS:,} calibration tokens; the text after them is held out")
    settings = f"{args.profile}, {args.num_samples} x {args.seq_len}" + (
        f", {args.blocks} blocks" if args.blocks else ""
    )
    missing = [
        (grid, name)
        for grid in GRIDS
        for name in METHODS
        if any(part in f"{grid} | {settings} | {name}" for part in args.only)
        and f"{grid} | {settings} | {name}" not in load(args.results)
    ]
    if args.dry_run:
        print(*(f"{grid} | {settings} | {name}" for grid, name in missing), sep="\n", file=sys.stderr)
    elif missing:
        measure_cells(args, settings, missing)
    print(table(load(args.results), settings))


def measure_cells(args: argparse.Namespace, settings: str, missing: list[tuple[str, str]]) -> None:
    """Run the missing cells, and store each when it is done."""
    models, texts = prepare(args.model, args.work)
    if "full precision" not in load(args.results):
        save(args.results, "full precision", perplexities(args.model, texts, args.threads))
    sizes = ["--profile", args.profile, "--num-samples", str(args.num_samples), "--seq-len", str(args.seq_len)]
    if args.blocks:
        texts = texts[:1]
        last = json.loads((args.model / "config.json").read_text())["num_hidden_layers"] - args.blocks
        sizes += ["--keep-last", str(last)]
    for grid, name in missing:
        cell = f"{grid} | {settings} | {name}"
        print(cell, file=sys.stderr, flush=True)
        flags = [*GRIDS[grid].own_flags(), *sizes, *METHODS[name].split()]
        out = args.work / re.sub(r"\W+", "-", cell)
        made = own_cell(flags, models[name.split(" | ")[0]], out, args.threads, texts)
        save(args.results, cell, {**made, "threads": args.threads})


if __name__ == "__main__":
    main()
