"""What people read: durations, the line of a window, plain output and the live line."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from cbqstream.records import EpochReport, Window, WindowReport
from cbqstream.report.progress import Progress, duration
from cbqstream.report.status import status_lines
from cbqstream.run.limits import over_limit

NUMERICS = {"device": "cpu", "threads": 1}
IDENTITY = {"identity": {"numerics": NUMERICS}}


def commit(made, **numerics):
    return {"report": made.to_dict(), "numerics": NUMERICS | numerics}


def report(index=1, seconds=30.0):
    return WindowReport(
        Window(index, index, index + 2, index + 1, index + 1),
        4,
        0.5,
        0.125,
        None,
        0.08,
        seconds,
        2.0,
        0.5,
        3 << 29,
        {},
        {},
        {},
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (61, "1m01s"), (3599, "59m59s"), (9660, "2h41m")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_plain_output_is_one_line_per_window_and_a_log(tmp_path):
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


def test_live_output_says_what_is_being_done():
    text = io.StringIO()
    with Progress(Console(file=text, force_terminal=True, width=120)) as progress:
        progress("window 1/4: targets")
        progress(report())
    assert "window 1/4: targets" in text.getvalue()
    assert "ETA" in text.getvalue()


def test_status_of_a_finished_window_less_run(tmp_path):
    content = {"config": {"model": "m", "out": str(tmp_path)}, "windows": 2, "epochs": 0, **IDENTITY}
    lines = status_lines(tmp_path, content, [])
    assert lines[1] == "windows done: 0 of 2"
    assert lines[2] == "time left: unknown"
    done = [commit(report(index)) for index in range(2)]
    assert "not put together" in status_lines(tmp_path, content, done)[-1]
    assert status_lines(tmp_path, content, done, has_result=True)[-1] == "finished"
    half = status_lines(tmp_path, content, done[:1])
    assert half[2] == "  window 1  blocks 0-1  loss 0.5 -> 0.125  30 s"
    assert half[3] == "time left: 30s"


def test_status_names_what_was_taken_back_and_other_numerics(tmp_path):
    content = {"config": {"model": "m", "out": str(tmp_path)}, "windows": 3, "epochs": 0, **IDENTITY}
    done = [commit(replace(report(0), reverted="not finite")), commit(report(1), threads=2)]
    lines = status_lines(tmp_path, content, done)
    assert lines[2] == "  window 1  blocks 0-1  loss 0.5 -> 0.125  30 s  reverted: not finite"
    assert lines[4] == "from commit 2 on with other numerics: threads 1 -> 2"


def test_status_of_a_run_that_moved_from_cpu_to_cuda(tmp_path):
    """On CUDA there are keys that a CPU does not have."""
    content = {"config": {"model": "m", "out": str(tmp_path)}, "windows": 2, "epochs": 0, **IDENTITY}
    lines = status_lines(tmp_path, content, [commit(report(0), device="cuda", cudnn=91002)])
    assert lines[3] == "from commit 1 on with other numerics: cudnn None -> 91002, device cpu -> cuda"


def test_status_and_progress_of_epochs_end_to_end(tmp_path):
    text = io.StringIO()
    epoch = EpochReport(0, 2, 0.5, 0.25, 12.0, 3 << 29)
    with Progress(Console(file=text, width=40), tmp_path / "log.jsonl") as progress:
        progress(epoch)
    assert text.getvalue() == "end to end 1/2  divergence 0.5 -> 0.25  12 s  RAM 1.50 GiB\n"
    assert json.loads((tmp_path / "log.jsonl").read_text()) == epoch.to_dict()
    content = {"config": {"model": "m", "out": str(tmp_path)}, "windows": 1, "epochs": 2, **IDENTITY}
    done = [commit(report(0)), commit(epoch)]
    assert status_lines(tmp_path, content, done)[1:] == [
        "windows done: 1 of 1",
        "  window 1  blocks 0-1  loss 0.5 -> 0.125  30 s",
        "epochs end to end done: 1 of 2",
        "  epoch 1  divergence 0.5 -> 0.25  12 s",
        "time left: 0s, and for the epochs 12s",
        f"a process that was stopped in a window does that window again; go on with: cbqstream resume {tmp_path}",
    ]
    assert status_lines(tmp_path, content, done[:1])[-2] == "time left: 0s, and for the epochs unknown"


def test_device_memory_is_told_and_held_against_the_limit(make_config):
    text, taken = io.StringIO(), replace(report(), peak_vram=3 << 30)
    with Progress(Console(file=text, width=200)) as progress:
        progress(taken)
    assert "  RAM 1.50 GiB  VRAM 3.00 GiB  ETA " in text.getvalue()
    assert taken.to_dict()["peak_vram"] == 3 << 30
    assert not over_limit(replace(make_config(), max_vram=4 << 30), taken)
    (warning,) = over_limit(replace(make_config(), max_vram=3 << 30), taken)  # the context counts
    assert warning.text == "device memory: 3.68 GiB were taken, --max-vram is 3.00; the plan was too low."
    assert over_limit(replace(make_config(), max_vram=3 << 30), EpochReport(0, 1, 1.0, 1.0, 1.0, 1, 3 << 30))
