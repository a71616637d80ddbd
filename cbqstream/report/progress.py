"""Progress of a run: one line per finished window and, on a terminal, a live line with the current step."""

import json
import time
from contextlib import AbstractContextManager
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cbqstream.disk import open_log
from cbqstream.errors import StorageError
from cbqstream.records import Costs, EpochReport, RunNotice, RunWarning, WindowReport
from cbqstream.runtime.memory import GIB, resident_bytes


def duration(seconds: float) -> str:
    """A duration as text, such as `45s`, `12m03s` or `2h41m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def window_line(report: WindowReport, remaining: float) -> str:
    """The line that is printed for a finished window.

    Args:
        report: report of the window.
        remaining: estimated time for the remaining windows in seconds.
    """
    costs = report.costs
    return (
        f"window {report.index + 1}/{report.num_windows}  blocks {report.start}-{report.stop - 1}"
        f"  loss {report.loss_before:.3g} -> {report.loss_after:.3g}  changed {report.changed:.1%}"
        f"{'' if costs is None else _window_costs(costs)}  ETA {duration(remaining)}"
        f"{f'  reverted: {report.reverted}' if report.reverted else ''}"
    )


def _window_costs(costs: Costs) -> str:
    """Time and memory of a window, and the part of its time that is largest: computing, reading or writing."""
    parts = {
        "computing": costs.seconds - costs.reading - costs.writing,
        "reading": costs.reading,
        "writing": costs.writing,
    }
    most = max(parts, key=lambda name: parts[name])
    share = f"{parts[most] / max(costs.seconds, 1e-9):.0%} {most}"
    vram = f"  VRAM {costs.peak_vram / GIB:.2f} GiB" if costs.peak_vram else ""
    return f"  {costs.seconds:.0f} s, {share}  RAM {costs.peak_rss / GIB:.2f} GiB{vram}"


def epoch_line(report: EpochReport) -> str:
    """The line that is printed for a finished epoch of the end-to-end stage."""
    costs = report.costs
    spent = "" if costs is None else f"  {costs.seconds:.0f} s  RAM {costs.peak_rss / GIB:.2f} GiB"
    losses = f"{report.loss_before:.3g} -> {report.loss_after:.3g}"
    return f"end to end {report.epoch + 1}/{report.num_epochs}  divergence {losses}{spent}"


class Progress(AbstractContextManager["Progress"]):
    """A listener of the pipeline that prints events and can append each report to a JSON-lines file.

    Args:
        console: console to print to.
        log_json: the JSON-lines file, or None.
    """

    def __init__(self, console: Console, log_json: Path | None = None) -> None:
        self._console = console
        self._log_json = log_json
        self._log: RawIOBase | None = None
        self._live: Live | None = None
        self._seconds: list[float] = []
        self._doing, self._since = "", 0.0

    def __enter__(self) -> Self:
        if self._log_json is not None:
            self._log = open_log(self._log_json)
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._now, console=self._console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self._log is not None:
            self._log.close()

    def __call__(self, event: str | WindowReport | EpochReport | RunWarning | RunNotice) -> None:
        """Print an event.

        Args:
            event: the current step, which the live line shows; a report, for which a line is printed; a warning or a notice.

        Raises:
            StorageError: the report cannot be appended to the file.
        """
        if isinstance(event, RunWarning | RunNotice):
            text = f"warning: {event.text}" if isinstance(event, RunWarning) else event.text
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)
            return
        if isinstance(event, str):
            self._doing, self._since = event, time.monotonic()
            return
        line = epoch_line(event) if isinstance(event, EpochReport) else self._window_line(event)
        self._console.print(line, highlight=False, soft_wrap=True)
        if self._log is not None:
            try:
                self._log.write(json.dumps(event.to_dict()).encode() + b"\n")
            except OSError as error:
                raise StorageError(f"{self._log_json}: {error.strerror}. Use another --log-json.") from error

    def _now(self) -> Text:
        """The live line: the current step, its time so far, and the memory in use."""
        lasting = duration(time.monotonic() - self._since)
        return Text(f"{self._doing}  {lasting}  RAM {resident_bytes() / GIB:.2f} GiB", style="dim")

    def _window_line(self, report: WindowReport) -> str:
        if report.costs is not None:
            self._seconds.append(report.costs.seconds)
        left = report.num_windows - report.index - 1
        return window_line(report, left * sum(self._seconds) / max(1, len(self._seconds)))
