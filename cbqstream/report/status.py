"""The state of a run as lines of text."""

from collections.abc import Sequence

from cbqstream.records import EpochReport, WindowReport
from cbqstream.report.progress import duration
from cbqstream.rundir.chain import Chain


def status_lines(chain: Chain, *, has_result: bool = False) -> list[str]:
    """The lines that `cbqstream status` prints.

    Args:
        chain: the run.
        has_result: whether the model is assembled.
    """
    run, windows, epochs = chain.run, chain.window_reports, chain.epoch_reports
    lines = [f"{run.config.model} -> {run.config.out}", f"windows done: {len(windows)} of {run.windows}"]
    for window in windows:
        reverted = f"  reverted: {window.reverted}" if window.reverted else ""
        blocks = f"blocks {window.start}-{window.stop - 1}"
        lines.append(f"  window {window.index + 1}  {blocks}  loss {_change(window)}{reverted}")
    if run.epochs:
        lines.append(f"epochs end to end done: {len(epochs)} of {run.epochs}")
    lines += [f"  epoch {epoch.epoch + 1}  divergence {_change(epoch)}" for epoch in epochs]
    before = run.identity.numerics
    for index, commit in enumerate(chain.commits):
        if commit.numerics != before:
            lines.append(f"numerics changed at commit {index + 1}: {before.changes_to(commit.numerics)}")
        before = commit.numerics
    if not chain.is_complete:
        lines.append(f"time left: {_left(windows, run.windows)}")
        if run.epochs:
            lines[-1] += f", and for the epochs {_left(epochs, run.epochs)}"
        lines.append(f"a window that was interrupted is repeated. To resume: cbqstream resume {chain.path}")
    elif has_result:
        lines.append("finished")
    else:
        lines.append(f"all windows are done, the model is not assembled yet. To resume: cbqstream resume {chain.path}")
    return lines


def _change(report: WindowReport | EpochReport) -> str:
    seconds = "" if report.costs is None else f"  {report.costs.seconds:.0f} s"
    return f"{report.loss_before:.3g} -> {report.loss_after:.3g}{seconds}"


def _left(reports: Sequence[WindowReport | EpochReport], number: int) -> str:
    """Estimated time for the remaining windows or epochs, from the mean time of the finished ones.

    Args:
        reports: reports of the finished windows or epochs.
        number: number of all windows or epochs.
    """
    costs = [report.costs for report in reports if report.costs is not None]
    if not costs:
        return "unknown"
    return duration((number - len(reports)) * sum(cost.seconds for cost in costs) / len(costs))
