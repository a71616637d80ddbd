"""What a run will need, for people."""

from collections.abc import Mapping
from typing import Any

from cbqstream.report.progress import duration
from cbqstream.runtime.memory import GIB

_SPREAD = 0.3
"""Of the time: what was measured in a few seconds is not what a machine does for hours."""


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """The lines of `cbqstream plan`, of what `run.plan.plan` found."""
    lines = [f"windows: {plan['windows']}"]
    for name, label in (("vram", "device memory"), ("ram", "memory"), ("disk", "disk")):
        if plan[name]:
            listed = ", ".join(f"{part} {size / GIB:.2f}" for part, size in plan[name].items() if size >= GIB / 200)
            lines.append(f"{label}: {plan[f'{name}_total'] / GIB:.2f} GiB ({listed})")
    moved = f"{plan['bytes_read'] / GIB:.1f} GiB read, {plan['bytes_written'] / GIB:.1f} GiB written"
    lines.append(
        f"source: {plan['source'] / GIB:.2f} GiB; in all {moved}, {plan['flop']:.1e} floating-point operations"
    )
    if plan["activation_checkpointing"]:
        lines.append("to keep the limit, activations of one block are kept and those of the others computed again")
    if plan["offload"]:
        lines.append(
            "and one layer of a window is in memory, the others lie on disk; the time that they take to and fro is not counted"
        )
    if plan["seconds"]:
        total = plan["seconds_total"]
        low, high = (duration(total * factor) for factor in (1 - _SPREAD, 1 + _SPREAD))
        shares = ", ".join(f"{part} {100 * value / total:.0f} %" for part, value in plan["seconds"].items())
        lines.append(f"time: {low} to {high} ({shares})")
    lines += [f"with {flags}: {_difference(plan, other)}" for flags, other in plan["smaller"].items()]
    return lines


def _difference(plan: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    told = []
    for name, label in (("vram", "device memory"), ("ram", "memory"), ("disk", "disk")):
        change = (other[f"{name}_total"] - plan[f"{name}_total"]) / GIB
        if abs(change) >= 0.005:
            told.append(f"{label} {change:+.2f} GiB")
    if plan["seconds"]:
        told.append(f"time {100 * (other['seconds_total'] / plan['seconds_total'] - 1):+.0f} %")
    return ", ".join(told) or "no change"
