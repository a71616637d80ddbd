"""The tool that measures on a machine with a CUDA device: a rehearsal on the CPU, and stages that fail or have no time."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent.parent / "tools"


@pytest.fixture
def tool(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("gpu_probe")


@pytest.fixture
def make_probe(tool, tmp_path):
    """A function that makes a `Probe` whose deadline is in a number of seconds."""

    def make(seconds):
        deadline = time.monotonic() - tool.BEGAN + seconds
        given = Namespace(device="cpu", small=True, deadline=deadline, out=tmp_path / "found.json", continued=False)
        return tool.Probe(given, tmp_path)

    return make


def stages_in(folder):
    """The stages in the file of results."""
    return json.loads((folder / "found.json").read_text())["stages"]


def two_parts(probe):
    """A stage that passes."""
    probe.part("first", lambda: 1)
    probe.part("second", lambda: {"GB/s": 2.5})
    return "two parts"


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(1), pytest.skip.Exception("no triton")], ids=repr)
def test_an_error_ends_neither_the_stage_nor_the_next_one(error, make_probe, tmp_path, capsys):
    def fail():
        raise error

    def failing(probe):
        probe.part("fails", fail)
        probe.part("comes after", lambda: "done")
        return fail()

    probe = make_probe(60)
    probe.stage("kernels", failing, 10, 0)
    probe.stage("tiny", two_parts, 10, 0)
    kernels, tiny = stages_in(tmp_path).values()
    assert (kernels["result"], tiny["result"], probe.passed) == ("FAILED", "passed", False)
    assert "in fail" in kernels["parts"]["fails"]["failed"]
    assert kernels["parts"]["comes after"] == "done"
    assert [type(error).__name__ in failure for failure in kernels["failures"]] == [True, True]
    assert tiny["parts"]["second"] == {"GB/s": 2.5}
    first, second = capsys.readouterr().out.splitlines()
    assert "kernels FAILED" in first
    assert second.endswith(": two parts")


def test_a_requirement_that_does_not_hold_fails_its_stage(make_probe, tmp_path):
    def checking(probe):
        probe.require(True, "holds")
        probe.require(False, "other bytes")
        return ""

    make_probe(60).stage("tiny", checking, 10, 0)
    assert stages_in(tmp_path)["tiny"]["failures"] == ["other bytes"]


def test_a_stage_ends_when_its_time_is_over(tool, make_probe, tmp_path, monkeypatch):
    """Its code may handle every `Exception`."""
    monkeypatch.setattr(tool, "SLOWER", 1)
    before = signal.signal(signal.SIGALRM, tool._out_of_time)

    def slow(probe):
        probe.part("before", lambda: 1)
        while True:
            try:
                time.sleep(30)
            except Exception:  # noqa: BLE001
                continue

    try:
        make_probe(60).stage("window", slow, 0.1, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    found = stages_in(tmp_path)["window"]
    assert found["parts"]["before"] == 1
    assert found["failures"][0].startswith("OutOfTimeError")
    assert found["seconds"] < 10


def test_stages_are_skipped_after_the_deadline(make_probe, tmp_path, capsys):
    probe = make_probe(-1)
    probe.stage("run", lambda probe: pytest.fail("it began"), 10, 5)
    assert (stages_in(tmp_path)["run"]["result"], probe.passed) == ("skipped", False)
    assert "run skipped" in capsys.readouterr().out


def test_the_other_stages_run_in_a_new_interpreter_if_the_device_is_lost(tool, make_probe, monkeypatch):
    """After an illegal memory access in a kernel, every operation on the device fails in that process."""
    started = []

    def start(path, command):
        started.append(command)
        raise KeyboardInterrupt  # nothing runs after a real call

    monkeypatch.setattr(tool, "device_is_lost", lambda: True)
    monkeypatch.setattr(tool, "stage_of", lambda name: two_parts)
    monkeypatch.setattr(tool.os, "execv", start)
    probe = make_probe(60)
    given = Namespace(device="cuda", small=True, wheels=Path("wheels"), scratch=None)
    probe.work = probe.work / "scratch"
    with pytest.raises(KeyboardInterrupt):
        tool.run_stages(probe, given, ["kernels", "tiny", "window"])
    _, *command = started[0]
    options = dict(zip(command[1:5:2], command[2:6:2], strict=True))
    assert command[0] == str(TOOLS / "gpu_probe.py")
    assert options["--out"] == str(probe.out)
    assert 50 < float(options["--deadline"]) <= 60
    assert command[5:] == ["--continued", "--stages", "tiny,window", "--small", "--wheels", "wheels"]


def finished(out, *options):
    """A process of the tool that has ended."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(TOOLS / "gpu_probe.py"), "--out", str(out), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_a_rehearsal_on_the_cpu_passes(tmp_path):
    ended = finished(tmp_path / "found.json", "--device", "cpu", "--stages", "env,ceilings,host")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    stages = stages_in(tmp_path)
    assert {name: stage["result"] for name, stage in stages.items()} == dict.fromkeys(
        ("env", "ceilings", "host"), "passed"
    )
    assert stages["host"]["parts"]["streams"].keys() >= {"stream, written", "stream, read"}
    assert ended.stdout.count(" passed in ") == 3


def test_a_process_that_hangs_ends_after_the_deadline_and_says_where(tmp_path):
    """No signal reaches native code that hangs. The results of the parts before it are in the file."""
    out = tmp_path / "found.json"
    code = f"""
import signal, time, gpu_probe

def hang(probe):
    probe.part("before", lambda: 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(60)

gpu_probe.GRACE, gpu_probe.stage_of = 1, lambda name: hang
gpu_probe.main(["--out", {str(out)!r}, "--device", "cpu", "--deadline", "1.5", "--stages", "run"])
"""
    began, environment = time.monotonic(), {**os.environ, "PYTHONPATH": str(TOOLS), "TMPDIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert time.monotonic() - began < 30
    assert "in hang" in ended.stderr
    assert stages_in(tmp_path)["run"]["parts"]["before"] == 1


def test_the_tool_needs_a_device_or_is_told_to_rehearse(tmp_path):
    ended = finished(tmp_path / "found.json")
    assert (ended.returncode, ended.stdout) == (69, "")
    assert ended.stderr == "no CUDA device. --device cpu is a rehearsal.\n"


def test_packages_in_wheels_are_behind_installed_ones(tool, tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "one-1-py3-none-any.whl", "w") as archive:
        archive.writestr("torch/__init__.py", "raise ImportError")
        archive.writestr("only_in_the_wheel.py", "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    tool.unpack_wheels(wheels, tmp_path / "site")
    code = "import only_in_the_wheel, importlib.util; print(importlib.util.find_spec('torch').origin)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in ended.stdout
    assert importlib.util.find_spec("only_in_the_wheel") is not None
