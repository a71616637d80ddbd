"""Printed progress, the log in JSON lines, the lines of `cbqstream status`, and the warning about memory limits."""

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from cbqstream.config import CalibrationConfig, QuantizeConfig
from cbqstream.records import Costs, EpochReport, Numerics, WindowReport
from cbqstream.report.progress import Progress, duration
from cbqstream.report.status import obstacles_to_resume, status_lines
from cbqstream.run.limits import over_limit
from cbqstream.rundir.chain import Chain
from cbqstream.rundir.identity import Identity
from cbqstream.rundir.records import Commit, RunRecord
from cbqstream.scheme import Scheme

NUMERICS = Numerics("cpu", "x86_64", "AVX2", threads=1, torch="2.13.0", transformers="5.24.0")


def report(index=1, seconds=30.0):
    """Report of a window of two blocks that took 1.5 GiB of memory."""
    return WindowReport(
        index=index,
        num_windows=4,
        start=index,
        stop=index + 2,
        loss_before=0.5,
        loss_after=0.125,
        reverted=None,
        changed=0.08,
        sqnr_db={},
        experts={},
        smoothed={},
        costs=Costs(seconds, peak_rss=3 << 29, reading=2.0, writing=0.5),
    )


def run_of(path, *, windows, epochs=0):
    """A run without commits."""
    config = QuantizeConfig(
        model="m", out=str(path), scheme=Scheme(num_bits=4), calibration=CalibrationConfig(dataset="d")
    )
    identity = Identity.of(config, model={}, weights="w", tokens="t", numerics=NUMERICS)
    return Chain(path, RunRecord("0.1.0", identity, config, windows, epochs, (4, 16, 64)), ())


def with_commit(run, report, numerics=NUMERICS):
    """The run with one more commit."""
    place = {"window": run.next_window, "prev": run.last}
    return run.extended(Commit(**place, parts={}, acts=None, source={}, numerics=numerics, report=report))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (61, "1m01s"), (3599, "59m59s"), (9660, "2h41m")]
)
def test_duration_as_text(seconds, text):
    assert duration(seconds) == text


def test_progress_prints_one_line_per_window_and_logs_every_report(tmp_path):
    text = io.StringIO()
    with Progress(Console(file=text, width=40), tmp_path / "log.jsonl") as progress:
        progress("window 1/4: targets")
        progress(report(0, 20.0))
        progress(report(1, 40.0))
    assert text.getvalue().splitlines() == [
        "window 1/4  blocks 0-1  loss 0.5 -> 0.125  changed 8.0%  20 s, 88% computing  RAM 1.50 GiB  ETA 1m00s",
        "window 2/4  blocks 1-2  loss 0.5 -> 0.125  changed 8.0%  40 s, 94% computing  RAM 1.50 GiB  ETA 1m00s",
    ]
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["window"] for record in records] == [0, 1]
    assert records[0] == report(0, 20.0).to_dict()


def test_progress_on_a_terminal_shows_the_current_step():
    text = io.StringIO()
    with Progress(Console(file=text, force_terminal=True, width=120)) as progress:
        progress("window 1/4: targets")
        progress(report())
    assert "window 1/4: targets" in text.getvalue()
    assert "ETA" in text.getvalue()


def test_status_of_a_run_before_during_and_after_its_windows(tmp_path):
    run = run_of(tmp_path, windows=2)
    lines = status_lines(run)
    assert lines[0] == f"m -> {tmp_path}"
    assert lines[1] == "windows done: 0 of 2"
    assert lines[2] == "time left: unknown"
    half = with_commit(run, report(0))
    assert status_lines(half)[2] == "  window 1  blocks 0-1  loss 0.5 -> 0.125  30 s"
    assert status_lines(half)[3] == "time left: 30s"
    done = with_commit(half, report(1))
    assert "not assembled" in status_lines(done)[-1]
    assert status_lines(done, has_result=True)[-1] == "finished"


def test_status_names_what_keeps_a_run_from_being_resumed(tmp_path):
    """A command that would fail is not recommended without its remedy."""
    run = with_commit(run_of(tmp_path, windows=2), report(0), replace(NUMERICS, torch="1.0"))
    (tmp_path / "file").touch()  # the folder is OUT, too
    obstacles = obstacles_to_resume(run)
    assert obstacles[:2] == [
        "m has no config.json; restore the model",
        "d is missing; restore the dataset",
    ]
    assert f"{tmp_path} is not empty and not the result of this run; move it away" in obstacles
    assert any(
        re.fullmatch(r"torch 1\.0 made the run, \S+ is installed; .* --allow-numerics-change", text)
        for text in obstacles
    )
    line = status_lines(run, obstacles=obstacles[:1])[-1]
    assert line.endswith(
        f"It cannot be resumed yet: m has no config.json; restore the model. Then: cbqstream resume {tmp_path}"
    )


def test_status_names_reverted_windows_and_changed_numerics(tmp_path):
    run = with_commit(run_of(tmp_path, windows=3), replace(report(0), reverted="not finite"))
    lines = status_lines(with_commit(run, report(1), replace(NUMERICS, threads=2)))
    assert lines[2] == "  window 1  blocks 0-1  loss 0.5 -> 0.125  30 s  reverted: not finite"
    assert lines[4] == "numerics changed at commit 2: threads 1 -> 2"


def test_status_of_a_run_that_was_resumed_on_another_device(tmp_path):
    """On the CPU, the versions of the libraries of CUDA are None."""
    on_cuda = replace(NUMERICS, device="cuda", cudnn=91002)
    lines = status_lines(with_commit(run_of(tmp_path, windows=2), report(0), on_cuda))
    assert lines[3] == "numerics changed at commit 1: device cpu -> cuda, cudnn None -> 91002"


def test_progress_and_status_of_epochs_of_the_end_to_end_stage(tmp_path):
    text = io.StringIO()
    epoch = EpochReport(0, 2, 0.5, 0.25, Costs(12.0, 3 << 29))
    with Progress(Console(file=text, width=40), tmp_path / "log.jsonl") as progress:
        progress(epoch)
    assert text.getvalue() == "end to end 1/2  divergence 0.5 -> 0.25  12 s  RAM 1.50 GiB\n"
    assert json.loads((tmp_path / "log.jsonl").read_text()) == epoch.to_dict()
    run = with_commit(run_of(tmp_path, windows=1, epochs=2), report(0))
    assert status_lines(with_commit(run, epoch))[1:] == [
        "windows done: 1 of 1",
        "  window 1  blocks 0-1  loss 0.5 -> 0.125  30 s",
        "epochs end to end done: 1 of 2",
        "  epoch 1  divergence 0.5 -> 0.25  12 s",
        "time left: 0s, and for the epochs 12s",
        f"a window that was interrupted is repeated. To resume: cbqstream resume {tmp_path}",
    ]
    assert status_lines(run)[-2] == "time left: 0s, and for the epochs unknown"


def test_device_memory_is_printed_and_compared_with_the_limit(make_config):
    costs = Costs(30.0, peak_rss=3 << 29, peak_vram=3 << 30)
    text, window = io.StringIO(), replace(report(), costs=costs)
    with Progress(Console(file=text, width=200)) as progress:
        progress(window)
    assert "  RAM 1.50 GiB  VRAM 3.00 GiB  ETA " in text.getvalue()
    assert window.to_dict()["costs"]["peak_vram"] == 3 << 30
    assert not over_limit(replace(make_config(), max_vram=4 << 30), window)
    (warning,) = over_limit(replace(make_config(), max_vram=3 << 30), window)  # the CUDA context counts
    assert warning.text == "device memory: 3.68 GiB were used, but --max-vram is 3.00; the plan was too low."
    epoch = EpochReport(0, 1, 1.0, 1.0, Costs(1.0, peak_rss=1, peak_vram=3 << 30))
    assert over_limit(replace(make_config(), max_vram=3 << 30), epoch)
