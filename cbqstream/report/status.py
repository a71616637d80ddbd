"""What a run directory says of its run, for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbqstream.config import QuantizeConfig
from cbqstream.report.progress import duration


def status_lines(run: Path, config: QuantizeConfig, num_windows: int, commits: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of `cbqstream status`.

    Args:
        run: the run directory.
        config: of the run.
        num_windows: how many there will be.
        commits: records of those that are done, in order.
    """
    lines = [f"{config.model} -> {config.out}", f"windows done: {len(commits)} of {num_windows}"]
    for commit in commits:
        report = commit["report"]
        first, stop = report["blocks"]
        lines.append(
            f"  window {commit['window'] + 1}  blocks {first}-{stop - 1}"
            f"  loss {report['loss_before']:.3g} -> {report['loss_after']:.3g}  {report['seconds']:.0f} s"
        )
    left = num_windows - len(commits)
    if left:
        pace = sum(commit["report"]["seconds"] for commit in commits) / len(commits) if commits else None
        lines.append(f"time left: {duration(left * pace) if pace is not None else 'unknown'}")
        lines.append(
            f"a process that was stopped in a window does that window again; go on with: cbqstream resume {run}"
        )
    elif (Path(config.out) / "config.json").exists():
        lines.append("finished")
    else:
        lines.append(f"all windows are done, the model is not put together yet: cbqstream resume {run}")
    return lines
