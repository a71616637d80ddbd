"""The machine: timings with one owner, and the global state of torch that is restored."""

import os
import threading
import time

import pytest
import torch

from cbqstream.disk import Disk
from cbqstream.errors import UsageError
from cbqstream.runtime import memory
from cbqstream.runtime.device import choose_device, compute_dtype, fixed_numerics, numerics_of
from cbqstream.runtime.timings import Timings

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("listed", "folder", "names", "limit", "left"),
    [
        ("0::/a/b", "a", ("memory.max", "memory.current", "inactive_file"), "1000", 1000 - 300 + 200),
        ("0::/a/b", "a", ("memory.max", "memory.current", "inactive_file"), "max", None),
        ("0::/", "", ("memory.max", "memory.current", "inactive_file"), "1000", 1000 - 300 + 200),
        (
            "5:cpu,memory:/a/b",
            "memory/a/b",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            "400",
            400 - 300 + 200,
        ),
        ("5:cpu:/a", "cpu/a", ("memory.max", "memory.current", "inactive_file"), "1000", None),
        (
            "5:memory:/docker/x",  # as seen from inside a container, where only the top exists
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            "200",
            100,
        ),
    ],
)
def test_available_memory_is_limited_by_control_groups(tmp_path, monkeypatch, listed, folder, names, limit, left):
    groups, group = tmp_path / "cgroups", tmp_path / "mounted" / folder
    groups.write_text(f"9:name=systemd:/\n{listed}\n")
    group.mkdir(parents=True)
    for name, content in zip(names, (limit, "300", None), strict=True):
        path = group / (name if content else "memory.stat")
        path.write_text(content or f"anon 1\n{name} 200\n")
    found = [*memory._left_in_control_groups(tmp_path / "mounted", groups)]
    assert found == ([] if left is None else [left])
    assert not [*memory._left_in_control_groups(tmp_path, tmp_path / "missing")]
    monkeypatch.setattr(memory, "_left_in_control_groups", lambda *places: iter(found))
    assert memory.available_bytes() == left or left is None


def test_timings_count_the_thread_that_made_them():
    timings = Timings()
    began = timings.now()

    def work(activity):
        with timings.measure(activity):
            time.sleep(0.02)

    work("reading")
    other = threading.Thread(target=work, args=("writing",))
    other.start()
    other.join()
    spent = timings.now().since(began)
    assert spent.reading >= 0.02
    assert spent.writing == 0
    assert spent.time >= 0.04


def test_timings_count_operations_of_the_disk(tmp_path):
    timings = Timings()
    disk = Disk(measure=timings.measure)
    began = timings.now()
    disk.write(tmp_path / "file", [b"x" * 1000])
    with disk.scratch(tmp_path / "scratch") as file:
        start = file.append(b"y" * 1000)
        written = timings.now()
        file.read(start, bytearray(1000))
    spent = timings.now().since(began)
    assert written.since(began).writing > 0
    assert spent.reading > 0
    assert spent.reading + spent.writing <= spent.time


def test_timings_count_an_operation_that_fails(tmp_path):
    timings = Timings()

    def fail():
        with timings.measure("writing"):
            time.sleep(0.01)
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert timings.now().writing >= 0.01


def state():
    """The global state of torch on which results depend."""
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


def test_fixed_numerics_restore_the_state_of_torch(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = state()
    with fixed_numerics(CPU, 2) as threads:
        assert threads == 2
        assert torch.get_num_threads() == 2
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with fixed_numerics(CPU, 1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    assert state() == before


def test_fixed_numerics_restore_the_state_after_an_error():
    before = state()
    with pytest.raises(ValueError, match="in the middle"), fixed_numerics(CPU, 2):
        raise ValueError("in the middle")
    assert state() == before


def test_an_environment_that_enables_tf32_is_refused(monkeypatch):
    before = state()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(UsageError, match="NVIDIA_TF32_OVERRIDE is set"), fixed_numerics(CPU):
        pass
    assert state() == before


def test_devices():
    assert choose_device("cpu") == CPU
    assert compute_dtype(CPU) == torch.float32
    with pytest.raises(UsageError, match="not auto, cpu or cuda"):
        choose_device("tpu")
    numerics = numerics_of(CPU, 3)
    assert (numerics.device, numerics.threads, numerics.torch, numerics.cuda) == ("cpu", 3, torch.__version__, None)
