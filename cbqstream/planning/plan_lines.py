"""A plan as lines of text."""

from collections.abc import Mapping

from cbqstream.planning.advice import terabytes, wear
from cbqstream.planning.planned import Plan
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
            lines.append(f"{label}: {_parts(parts)}")
    lines += [
        f"source: {plan.source / GIB:.2f} GiB; {plan.flop:.1e} floating-point operations",
        f"read: {_parts(plan.read)}, {plan.bytes_read / plan.source:,.1f} times the source",
        f"written: {_parts(plan.written)}",
        f"wear: {terabytes(plan.bytes_written)} written, {wear(plan):.1%} of the endurance of a common SSD of 1 TB",
    ]
    if plan.bus:
        lines.append(f"copied to and from the device: {_parts(plan.bus)}")
    if plan.seconds:
        total = plan.seconds_total
        low, high = (duration(total * factor) for factor in (1 - _SPREAD, 1 + _SPREAD))
        shares = ", ".join(f"{part} {100 * value / total:.0f} %" for part, value in plan.seconds.items())
        lines.append(f"time: {low} to {high} ({shares})")
    if plan.disks is not None:
        read, write, source = (
            f"{rate / 1e9:.2f} GB/s" for rate in (plan.disks.read, plan.disks.write, plan.disks.source)
        )
        lines.append(
            f"speed of disks: {read} read and {write} written in {plan.disks.folder}, {source} read from the source"
        )
    if plan.modes:
        lines.append(f"the run takes: {plan.way} ({plan.reason})")
    lines += _table(plan)
    lines += [f"warning: {text}" for text in plan.warnings]
    return lines


def _parts(parts: Mapping[str, int]) -> str:
    """A sum of bytes and its parts."""
    listed = ", ".join(f"{part} {size / GIB:,.2f}" for part, size in parts.items() if size >= GIB / 200)
    return f"{sum(parts.values()) / GIB:,.2f} GiB" + (f" ({listed})" if listed else "")


def _table(plan: Plan) -> list[str]:
    """Lines of a table with a row for each way to run the model; sizes are in GiB."""
    ways = {**plan.modes, **plan.smaller}
    if not ways:
        return []
    header = ["way", "memory", "disk", "read", "written", "time", "fits"]
    if plan.vram:
        header[1:2] = ["device memory", "memory", "copied to device"]
    rows = [header, *([name, *_cells(other)] for name, other in ways.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    text = "ways to run it, in GiB; flags change the result, and are not taken by themselves:"
    return [text, *("  " + "  ".join(_aligned(row, widths)).rstrip() for row in rows)]


def _aligned(row: list[str], widths: list[int]) -> list[str]:
    """Cells of a row of the table: the first and the last to the left, the others to the right."""
    last = len(row) - 1
    return [
        cell.ljust(width) if column in (0, last) else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _cells(plan: Plan) -> list[str]:
    """Cells of the row of a plan, without the name."""
    sizes = [plan.largest("ram"), plan.disk_total, plan.bytes_read, plan.bytes_written]
    if plan.vram:
        sizes[:1] = [plan.largest("vram"), plan.largest("ram"), sum(plan.bus.values())]
    time = duration(plan.seconds_total) if plan.seconds else ""
    return [*(f"{size / GIB:,.2f}" for size in sizes), time, f"no: {plan.exceeded}" if plan.exceeded else "yes"]
