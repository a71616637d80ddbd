"""A plan as lines of text."""

from cbqstream.planning.plan import Plan
from cbqstream.report.progress import duration
from cbqstream.runtime.memory import GIB

_SPREAD = 0.3
"""Uncertainty of the time, because a machine that runs for hours is slower than in a few seconds of measurement."""


def plan_lines(plan: Plan) -> list[str]:
    """The lines of `cbqstream plan`."""
    lines = [f"windows: {plan.windows}"]
    if plan.quantized is not None:
        lines.append(f"quantized: {plan.quantized:.1%} of the weights of the blocks")
    for parts, label in ((plan.vram, "device memory"), (plan.ram, "memory"), (plan.disk, "disk")):
        if parts:
            listed = ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts.items() if size >= GIB / 200)
            lines.append(f"{label}: {sum(parts.values()) / GIB:.2f} GiB ({listed})")
    moved = f"{plan.bytes_read / GIB:.1f} GiB read, {plan.bytes_written / GIB:.1f} GiB written"
    lines.append(f"source: {plan.source / GIB:.2f} GiB; {moved}, {plan.flop:.1e} floating-point operations")
    if plan.memory_mode.activation_checkpointing:
        lines.append("activation checkpointing: needed to stay within the limit")
    if plan.memory_mode.offload:
        lines.append("offloading: one layer of a window is in memory, the others are on disk; its time is not counted")
    if plan.seconds:
        total = plan.seconds_total
        low, high = (duration(total * factor) for factor in (1 - _SPREAD, 1 + _SPREAD))
        shares = ", ".join(f"{part} {100 * value / total:.0f} %" for part, value in plan.seconds.items())
        lines.append(f"time: {low} to {high} ({shares})")
    lines += [f"with {flags}: {_difference(plan, other)}" for flags, other in plan.smaller.items()]
    lines += [f"warning: {text}" for text in plan.warnings]
    return lines


def _difference(plan: Plan, other: Plan) -> str:
    """Differences in memory, disk space and time between a plan and one with other settings."""
    differences = []
    for label, before, after in (
        ("device memory", plan.largest("vram"), other.largest("vram")),
        ("memory", plan.largest("ram"), other.largest("ram")),
        ("disk", plan.disk_total, other.disk_total),
    ):
        change = (after - before) / GIB
        if abs(change) >= 0.005:
            differences.append(f"{label} {change:+.2f} GiB")
    if plan.seconds:
        differences.append(f"time {100 * (other.seconds_total / plan.seconds_total - 1):+.0f} %")
    return ", ".join(differences) or "no change"
