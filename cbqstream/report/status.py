"""The state of a run as lines of text."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cbqstream.disk import is_occupied
from cbqstream.records import EpochReport, WindowReport
from cbqstream.report.progress import duration
from cbqstream.rundir.chain import Chain
from cbqstream.rundir.partial import facts_inside


def status_lines(chain: Chain, *, has_result: bool = False, obstacles: Sequence[str] = ()) -> list[str]:
    """The lines that `cbqstream status` prints.

    Args:
        chain: the run.
        has_result: whether the model is assembled.
        obstacles: what has to be done before the run can be resumed, see `obstacles_to_resume`.
    """
    resume = f"cbqstream resume {chain.path}"
    resume = (
        f"It cannot be resumed yet: {'; '.join(obstacles)}. Then: {resume}" if obstacles else f"To resume: {resume}"
    )
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
        inside = facts_inside(chain.path, chain.last)
        experts = sum(len(facts.get("experts", ())) for facts in inside.values())
        kept = f", except for {experts:,} experts that are finished" if experts else ""
        lines.append(f"a window that was interrupted is repeated{kept}. {resume}")
    elif has_result:
        lines.append("finished")
    else:
        lines.append(f"all windows are done, the model is not assembled yet. {resume}")
    return lines


def obstacles_to_resume(chain: Chain) -> list[str]:
    """Reasons why a run cannot be resumed now, each with its remedy. Only what is known without reading weights is looked at.

    Args:
        chain: a run whose model is not assembled.
    """
    config, found = chain.run.config, []
    if not (Path(config.model) / "config.json").is_file():
        found.append(f"{config.model} has no config.json; restore the model")
    if not Path(config.calibration.dataset).exists():
        found.append(f"{config.calibration.dataset} is missing; restore the dataset")
    if is_occupied(Path(config.out)):
        found.append(f"{config.out} is not empty and not the result of this run; move it away")
    versions = {"torch": chain.numerics.torch, "transformers": chain.numerics.transformers}
    for package, before in versions.items():
        now = _installed(package)
        if now != before.partition("+")[0]:
            found.append(
                f"{package} {before} made the run, {now} is installed; install it, or add --allow-numerics-change"
            )
    return found


def _installed(package: str) -> str | None:
    """Version of a package without its local part, such as +cpu; None if it is not installed."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


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
