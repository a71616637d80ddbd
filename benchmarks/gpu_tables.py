#!/usr/bin/env python3
"""Print the tables of two results of tools/gpu_probe.py, before and after a change.

Usage: gpu_tables.py BEFORE AFTER

Both have the stages env, ceilings, kernels, window and run. The other tables are those of BEFORE.
"""

import json
import sys
from pathlib import Path
from typing import Any

GIB = 1 << 30
KERNELS = {"num_bits=4, group_size=128": "group 128", "group_size=None": "per channel", "group_size=32": "group 32"}
KERNELS |= {"symmetric=False": "group 64, asymmetric", "lora_rounding": "lora_rounding, group 128, rank 5"}


def parts(result: dict[str, Any], stage: str) -> dict[str, Any]:
    """Results of a stage by part; nothing if it was not run."""
    return result["stages"].get(stage, {}).get("parts", {})


def shown(cell: object) -> str:
    """Text of a cell: at most three digits after the first that is not 0, and no exponent."""
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if cell >= 100 else f"{cell:.3g}"


def table(title: str, head: list[str], rows: list[list[object]]) -> None:
    """Print a table of Markdown."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(shown, row))} |")


def kernel_rows(results: list[dict[str, Any]]) -> list[list[object]]:
    """Rates of the kernels in GB/s: plain, and with Triton before and after."""
    rows: list[list[object]] = []
    for part, found in parts(results[0], "kernels").items():
        names = [name for mark, name in KERNELS.items() if mark in part]
        if not names:  # not a kernel with two passes
            continue
        for way in ("forward", "backward"):
            triton = [parts(result, "kernels").get(part, {}).get(f"Triton, {way}", "") for result in results]
            rows.append([names[-1], way, found[f"plain, {way}"], *triton])
    return rows


def step_rows(results: list[dict[str, Any]]) -> list[list[object]]:
    """Seconds and kernels of training steps. A time that is not positive was spoiled by something else on the machine."""
    rows: list[list[object]] = []
    for name in ("batch 1", "batch 4", "lora_rounding", "plain kernels"):
        row: list[object] = [name if name != "lora_rounding" else "batch 1, lora_rounding"]
        for result in results:
            step, seen = (parts(result, "window").get(key, {}) for key in (name, f"{name}, profile"))
            spent = step.get("step", 0.0)
            row += [step.get("products", ""), spent if spent > 0 else "", step["ratio"] if spent > 0 else ""]
            row += [seen.get("busy", ""), seen.get("kernels", "")]
        rows.append(row)
    return rows


def phase_rows(results: list[dict[str, Any]]) -> list[list[object]]:
    """Seconds of the phases of a run."""
    phases = [dict(parts(result, "run")["16 segments, one epoch"]["phases"]) for result in results]
    rows = [[name.rpartition(": ")[2], *(each[name] for each in phases)] for name in phases[0]]
    return [*rows, ["all", *(sum(each.values()) for each in phases)]]


def main() -> None:
    results = [json.loads(Path(path).read_text()) for path in sys.argv[1:3]]
    env, rates = parts(results[0], "env"), parts(results[0], "ceilings")
    versions = ", ".join(f"{name} {env['versions'][name]}" for name in ("torch", "triton", "transformers"))
    print(f"{env['device']['name']}, {env['machine']['cores']} cores, {versions}")
    print({name: value for name, value in rates.items() if name != "seconds"})
    rows = kernel_rows(results)
    table("Kernels, GB/s", ["weight", "pass", "plain", "before", "after"], rows)
    searches = [(name, found) for name, found in parts(results[1], "kernels").items() if name.startswith("search")]
    rows = [[name.partition(", s of")[0], found["plain"], found["Triton"]] for name, found in searches]
    table("Search of a grid, seconds", ["weight of 2048 x 22016", "plain", "Triton"], rows)
    names = [
        f"{name}{when}"
        for when in (", before", ", after")
        for name in ("products, s", "step, s", "ratio", "busy, s", "kernels")
    ]
    table("Training steps of two blocks of 65B shape, 2048 tokens a segment", ["step", *names], step_rows(results))
    table(
        "A run of two blocks of 65B shape, 16 segments, one epoch, seconds",
        ["phase", "before", "after"],
        phase_rows(results),
    )
    capped = {name: row for name, row in parts(results[0], "cap").items() if isinstance(row, dict) and "step" in row}
    rows = [
        [name, row["memory mode"], row["ratio"], row["peak_vram"] / GIB, row["planned"]] for name, row in capped.items()
    ]
    table("Limits of device memory", ["window and limit", "memory mode", "ratio", "peak, GiB", "planned, GiB"], rows)
    slabs = [(name.partition(",")[0], found) for name, found in parts(results[0], "products").items() if "slab" in name]
    mean = [(name, 3 / sum(1 / rate for rate in found.values())) for name, found in slabs]
    rows = [
        [name, rate, *(other / rate for _, other in mean[at + 1 : at + 3])]
        for at, (name, rate) in list(enumerate(mean))[::3]
    ]
    table("Products of slabs with rows that are not aligned", ["slab", "TFLOP/s", "2304 rows", "2048 rows"], rows)
    seen = [(name, found) for name, found in parts(results[0], "products").items() if "attention" in name]
    table(
        "Attention of 64 heads, forward and backward", ["", "ms", "kernel"], [[n, f["ms"], f["kind"]] for n, f in seen]
    )
    flat = [(name, value) for name, value in parts(results[0], "host").items() if name != "seconds"]
    rows = [
        [f"{name}: {each}", rate] for name, found in flat if isinstance(found, dict) for each, rate in found.items()
    ]
    rows += [[name, found] for name, found in flat if isinstance(found, float)]
    table("The host, GB/s if not said otherwise", ["", ""], rows)


if __name__ == "__main__":
    main()
