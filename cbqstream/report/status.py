"""What a run directory says of its run, for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cbqstream.report.progress import duration


def status_lines(
    run: Path, content: Mapping[str, Any], commits: Sequence[Mapping[str, Any]], *, has_result: bool = False
) -> list[str]:
    """The lines of `cbqstream status`.

    Args:
        run: the run directory.
        content: of its run.json.
        commits: records of what is done, in order.
        has_result: whether the model is put together.
    """
    config, windows, epochs = content["config"], content["windows"], content["epochs"]
    reports = [commit["report"] for commit in commits]
    lines = [f"{config['model']} -> {config['out']}", f"windows done: {len(reports[:windows])} of {windows}"]
    for index, report in enumerate(reports[:windows]):
        first, stop = report["blocks"]
        reverted = f"  reverted: {report['reverted']}" if report["reverted"] else ""
        lines.append(f"  window {index + 1}  blocks {first}-{stop - 1}  loss {_change(report)}{reverted}")
    if epochs:
        lines.append(f"epochs end to end done: {len(reports[windows:])} of {epochs}")
    for index, report in enumerate(reports[windows:]):
        lines.append(f"  epoch {index + 1}  divergence {_change(report)}")
    before = content["identity"]["numerics"]
    for index, commit in enumerate(commits):
        if commit["numerics"] != before:
            lines.append(f"from commit {index + 1} on with other numerics: {_difference(before, commit['numerics'])}")
        before = commit["numerics"]
    if len(reports) < windows + epochs:
        lines.append(f"time left: {_left(reports[:windows], windows)}")
        if epochs:
            lines[-1] += f", and for the epochs {_left(reports[windows:], epochs)}"
        lines.append(
            f"a process that was stopped in a window does that window again; go on with: cbqstream resume {run}"
        )
    elif has_result:
        lines.append("finished")
    else:
        lines.append(f"all windows are done, the model is not put together yet: cbqstream resume {run}")
    return lines


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    return ", ".join(f"{key} {before.get(key)} -> {after.get(key)}" for key in changed)


def _change(report: Mapping[str, Any]) -> str:
    return f"{report['loss_before']:.3g} -> {report['loss_after']:.3g}  {report['seconds']:.0f} s"


def _left(reports: Sequence[Mapping[str, Any]], number: int) -> str:
    """How long the rest of `number` such will take, by the mean of those that are done."""
    if not reports:
        return "unknown"
    return duration((number - len(reports)) * sum(report["seconds"] for report in reports) / len(reports))
