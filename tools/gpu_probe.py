#!/usr/bin/env python3
"""Measure in one process, before a deadline, what the package does on a machine with one CUDA device.

Usage: gpu_probe.py --out FILE [--deadline 325] [--stages a,b] [--device cuda|cpu] [--small] [--wheels FOLDER] [--scratch FOLDER]

The stages are in gpu_stages.py. Each has a limit of time, and is skipped if too little time is left. An error ends a part of a stage, and
the next part begins. FILE (JSON) is written again after each part. 20 seconds after the deadline the process ends itself and prints where
it was. With --small, and with --device cpu, sizes are small: a rehearsal, which takes three minutes of CPU time.

The exit code is 0 if all stages passed, 1 if something failed or was skipped, and 69 if there is no CUDA device.
"""

import argparse
import faulthandler
import gc
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    "env": (90, 5),
    "ceilings": (20, 5),
    "kernels": (60, 10),
    "tiny": (90, 20),
    "products": (25, 8),
    "window": (110, 30),
    "host": (50, 15),
    "run": (100, 45),
    "kill": (100, 50),
    "cap": (120, 20),
    "tests": (320, 60),
}
"""For each stage, the seconds that it may take, and the seconds without which it does not begin."""
SLOWER = 4
"""Factor of the limits in a rehearsal."""
GRACE = 20
"""Seconds after the deadline in which the process may end by itself."""
NO_DEVICE = 69
PACKAGES = (
    *("torch", "triton", "transformers", "tokenizers", "accelerate", "safetensors", "numpy", "zarr", "numcodecs"),
    *("compressed-tensors", "gguf", "pytest", "huggingface-hub"),
)
MODULES = (
    *("cbqstream.run.pipeline", "cbqstream.evaluation.perplexity", "cbqstream.packed.exports", "cbqstream.cli.main"),
    *("cbqstream.rounding.signround_triton", "bench_window", "bench_io", "tiny", "test_triton", "gpu_stages"),
)


class OutOfTimeError(BaseException):
    """Raised in a stage whose time is over. It is not an `Exception`, so that the package does not handle it."""


class Probe:
    """Settings, clock and results.

    Args:
        args: arguments of the command line.
        work: folder for temporary files.
    """

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.device_name: str = args.device
        self.small: bool = args.small or args.device == "cpu"
        self.work = work
        self.end = BEGAN + args.deadline
        self.out: Path = args.out
        self.found: dict[str, Any] = {"stages": {}}
        if args.continued:
            self.found = json.loads(self.out.read_text())
        self._parts: dict[str, Any] = {}
        self._failures: list[str] = []
        self._skipped: list[str] = []
        self._stage_end = self.end

    @property
    def left(self) -> float:
        """Seconds until the stage must end."""
        return min(self.end, self._stage_end) - time.monotonic()

    @property
    def passed(self) -> bool:
        """Whether every stage so far passed, and nothing was skipped."""
        return all(stage["result"] == "passed" for stage in self.found["stages"].values())

    def save(self) -> None:
        """Write the results so far."""
        building = self.out.with_name(f"{self.out.name}.part")
        building.write_text(json.dumps(self.found | {"seconds": time.monotonic() - BEGAN}, indent=1, default=str))
        building.replace(self.out)

    def require(self, holds: bool, what: str) -> None:
        """Count a failure if something does not hold."""
        if not holds:
            self._failures.append(what)

    def part(self, name: str, work: Callable[[], Any], need: float = 0) -> Any:
        """The result of a part of a stage, which is saved; None if it failed, or if fewer than `need` seconds are left."""
        if not self.small and self.left < need:
            self._parts[name] = f"skipped: {self.left:.0f} s left, {need} needed"
            self._skipped.append(name)
            return None
        gc.freeze()  # every window of a run collects garbage, and imported modules would take most of that time
        began, result = time.monotonic(), None
        try:
            result = self._parts[name] = work()
        except (OutOfTimeError, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001  # whatever it is, the next part begins
            self._parts[name] = {"failed": traceback.format_exc()}
            self._failures.append(f"{name}: {_short(error)}")
        self._parts.setdefault("seconds", {})[name] = time.monotonic() - began
        free_device_memory()
        with suppress(OSError):  # a full disk must not end the stage
            self.save()
        return result

    def stage(self, name: str, work: "Callable[[Probe], str]", limit: float, need: float) -> None:
        """Run a stage, and print a line about it.

        Args:
            name: name of the stage.
            work: runs the parts, and returns a summary.
            limit: seconds that it may take.
            need: seconds without which it does not begin.
        """
        began, said = time.monotonic(), ""
        self._parts, self._failures, self._skipped = {}, [], []
        self._stage_end = began + limit * (SLOWER if self.small else 1)
        stage = self.found["stages"][name] = {
            "result": "not finished",
            "parts": self._parts,
            "failures": self._failures,
        }
        need = 1 if self.small else need
        if self.end - began < need:
            stage["result"] = "skipped"
            said = f"{self.end - began:.0f} s left, {need} needed"
        else:
            signal.setitimer(signal.ITIMER_REAL, max(1.0, self.left), 5)  # again, if something ignores the error
            try:
                said = work(self)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001
                self._parts["failed"] = traceback.format_exc()
                self._failures.append(_short(error))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            stage["result"] = "FAILED" if self._failures else "incomplete" if self._skipped else "passed"
        free_device_memory()
        stage |= {"seconds": time.monotonic() - began, "summary": said}
        with suppress(OSError):
            self.save()
        at, result = time.monotonic() - BEGAN, f"{stage['result']} in {stage['seconds']:.1f} s"
        skipped = [f"skipped: {', '.join(self._skipped)}"] if self._skipped else []
        print(f"[{at:4.0f} s] {name} {result}: {' | '.join([said, *self._failures[:5], *skipped])}", flush=True)


def _short(error: BaseException) -> str:
    """An error, and where it was raised, in one line."""
    frame = [each for each in traceback.extract_tb(error.__traceback__) if each.name != _out_of_time.__name__][-1]
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"


def _out_of_time(*_: object) -> None:
    raise OutOfTimeError


def free_device_memory() -> None:
    """Return the memory of what failed or ended to the device."""
    gc.collect()
    if "torch" in sys.modules:
        with suppress(Exception):
            sys.modules["torch"].cuda.empty_cache()


def device_is_lost() -> bool:
    """Whether an error of a kernel has ended the use of the CUDA device in this process."""
    try:
        importlib.import_module("torch").cuda.synchronize()
    except Exception:  # noqa: BLE001  # any error
        return True
    return False


def env(probe: Probe) -> str:
    """Versions, device and machine, and which modules can be imported."""
    import torch

    def versions() -> dict[str, str]:
        found = {"python": sys.version, "platform": platform.platform()}
        for name in PACKAGES:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "missing"
        return found

    def machine() -> dict[str, Any]:
        return {
            "cores": len(os.sched_getaffinity(0)),
            "memory": Path("/proc/meminfo").read_text().splitlines()[:3],
            "processor": [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line][:1],
            "free disk, GB": shutil.disk_usage(probe.work).free / 1e9,
            "C compiler": shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang"),
            "Python.h": (Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),  # Triton needs both
        }

    def device() -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(0)
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
        return {
            "name": torch.cuda.get_device_name(0),
            "capability": torch.cuda.get_device_capability(0),
            "memory, free and total, GB": [size / 1e9 for size in torch.cuda.mem_get_info()],
            "multiprocessors": properties.multi_processor_count,
            "CUDA, cuDNN": [torch.version.cuda, torch.backends.cudnn.version()],
            query: told.stdout.strip() or told.stderr,
        }

    got = probe.part("versions", versions)
    probe.part("machine", machine)
    if probe.device_name == "cuda":
        probe.part("device", device)
    for name in MODULES:
        probe.part(f"import {name}", lambda name=name: importlib.import_module(name).__file__)
    where = torch.cuda.get_device_name(0) if probe.device_name == "cuda" else "CPU"
    return f"{where}, torch {got['torch']}, triton {got['triton']}, transformers {got['transformers']}"


def unpack_wheels(folder: Path, site: Path) -> None:
    """Unpack wheels, and add them behind the packages that are installed, here and in processes that are started."""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site / "packages")
    (site / "sitecustomize.py").write_text(f"import sys; sys.path.append({str(site / 'packages')!r})\n")
    sys.path.append(str(site / "packages"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])


def prepare(args: argparse.Namespace, work: Path) -> None:
    """Set everything that must be set before torch and triton are imported."""
    warnings.simplefilter("default")  # a warning is shown and is never an error
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default", "PYTHONUNBUFFERED": "1"}
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as `fixed_numerics` sets it
    if args.device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    if args.wheels:
        unpack_wheels(args.wheels, work / "site")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    sys.path[:0] = [str(ROOT / folder) for folder in ("", "tools", "benchmarks", "tests", "tests/unit")]


def stage_of(name: str) -> Callable[[Probe], str]:
    """The function of a stage. The other module is imported where its errors are those of the stage."""
    return env if name == "env" else lambda probe: getattr(importlib.import_module("gpu_stages"), name)(probe)


def run_stages(probe: Probe, args: argparse.Namespace, names: Sequence[str]) -> None:
    """Run stages. If the device is lost, the other stages run in a new interpreter, which takes the place of this one."""
    for position, name in enumerate(names):
        probe.stage(name, stage_of(name), *STAGES[name])
        left, rest = probe.end - time.monotonic(), names[position + 1 :]
        if rest and args.device == "cuda" and device_is_lost():
            print("the CUDA device is lost; starting again for the other stages", flush=True)
            options = [f"--{key}" for key in ("small",) if getattr(args, key)]
            for key in ("wheels", "scratch"):
                options += [] if getattr(args, key) is None else [f"--{key}", str(getattr(args, key))]
            shutil.rmtree(probe.work, ignore_errors=True)
            command = [sys.executable, __file__, "--out", str(probe.out), "--deadline", f"{left:.0f}", "--continued"]
            os.execv(sys.executable, [*command, "--stages", ",".join(rest), *options])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--deadline", type=float, default=325, help="seconds from the start of the process")
    parser.add_argument("--stages", default=",".join(STAGES), help="names of stages, separated by commas")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="device; cpu is a rehearsal")
    parser.add_argument("--small", action="store_true", help="small sizes, as on the CPU")
    parser.add_argument("--wheels", type=Path, help="folder that tools/gpu_wheels.sh filled")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files")
    parser.add_argument("--continued", action="store_true", help=argparse.SUPPRESS)  # add to the results in FILE
    args = parser.parse_args(arguments)
    names = args.stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"unknown stage {', '.join(unknown)}. The stages are {', '.join(STAGES)}.")
    args.out = args.out.absolute()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(1.0, args.deadline + GRACE), exit=True)
    signal.signal(signal.SIGALRM, _out_of_time)
    work = Path(tempfile.mkdtemp(prefix="gpu-probe-", dir=args.scratch))
    try:
        prepare(args, work)
        if args.device == "cuda" and not importlib.import_module("torch").cuda.is_available():
            print("no CUDA device. --device cpu is a rehearsal.", file=sys.stderr)
            return NO_DEVICE
        probe = Probe(args, work)
        run_stages(probe, args, names)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        faulthandler.cancel_dump_traceback_later()
        gc.unfreeze()  # some libraries report objects that are left over as leaks
    probe.save()
    print(f"{'all stages passed' if probe.passed else 'not all stages passed'}: {args.out}")
    return 0 if probe.passed else 1


if __name__ == "__main__":
    sys.exit(main())
