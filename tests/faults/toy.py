"""A small run, a server that starts its processes, and `Toy.finishes`, the check that all fault tests share."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import SEQ_LEN, files_of, save_model, save_tokens

HERE = Path(__file__).parent
NIGHTLY = bool(os.environ.get("CBQSTREAM_NIGHTLY"))
"""Whether the tests try every case, as `tools/nightly.sh` asks for, instead of a sample."""
SAMPLES = 4
"""Number of calibration segments."""
WINDOWS = 3
"""Number of windows of the run."""
STEPS = 4
"""Number of training steps in a window.

They are enough for training to lower the loss of every window, so every file that is compared depends on trained values.
"""


@dataclass(frozen=True)
class Ended:
    """Result of a process: exit code (or minus the signal that killed it), standard output, standard error, and duration in seconds."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def windows(self) -> int:
        """Number of windows that the process finished."""
        return len(re.findall(r"^window \d", self.out, re.MULTILINE))


class Toy:
    """The toy run: a model, calibration tokens, and a server that forks a process for each command line.

    The run is finished once without faults. `expected` and `expected_parts` hold the files of its result and of parts/, `operations` its
    durable operations, and `seconds` its duration.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_model(folder / "model")
        self.tokens = save_tokens(folder / "tokens.npy", SAMPLES * SEQ_LEN)
        command, pipe = [sys.executable, str(HERE / "server.py")], subprocess.PIPE
        found = {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path]), "HF_HUB_OFFLINE": "1"}
        self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **found})
        self._number = 0
        whole = self.run(self.quantize(folder / "whole"), count=folder / "operations.json")
        assert whole.code == 0, whole.err
        assert "reverted" not in whole.out
        self.expected = files_of(folder / "whole")
        self.expected_parts = files_of(folder / "whole.run" / "parts")
        self.seconds = whole.seconds
        self.operations: list[tuple[str, str]] = [
            (name, path) for name, path in json.loads((folder / "operations.json").read_text())
        ]

    def close(self) -> None:
        """Stop the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def new_out(self) -> Path:
        """A path for OUT that no earlier run used."""
        self._number += 1
        return self.folder / f"out-{self._number}"

    def quantize(self, out: Path, *more: Any, model: Path | None = None) -> list[str]:
        """Arguments of the command that runs the toy.

        Args:
            out: the folder OUT.
            more: further arguments, which take precedence over those of the toy.
            model: the model folder; the toy's own model by default.
        """
        sizes = ["--num-samples", SAMPLES, "--seq-len", SEQ_LEN, "--group-size", 32, "--batch-size", 4]
        where = ["--threads", 1, "--device", "cpu", "--epochs", STEPS, "--dataset", self.tokens]
        return [str(value) for value in ("quantize", model or self.model, out, *sizes, *where, *more)]

    def start(self, arguments: list[str], **fault: Any) -> int:
        """Start a process and return its number, which `wait` and `signal` take. The faults are described in server.py."""
        return self._ask({"arguments": arguments, **fault})["number"]

    def wait(self, number: int) -> Ended:
        """Wait until a process ends. The warning that so few segments cannot be held out is removed from its output."""
        answer, warning = self._ask({"wait": number}), f"warning: {SAMPLES} segments are too few to hold some out"
        lines = answer["out"].splitlines(keepends=True)
        return Ended(**answer | {"out": "".join(line for line in lines if not line.startswith(warning))})

    def signal(self, number: int, which: int) -> None:
        """Send a signal to a process."""
        self._ask({"signal": which, "number": number})

    def run(self, arguments: list[str], **fault: Any) -> Ended:
        """Start a process and wait until it ends."""
        return self.wait(self.start(arguments, **fault))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(request, default=str), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        assert answer, "the server has ended"
        return json.loads(answer)

    def committed(self, out: Path) -> int:
        """Number of committed windows of the run for `out`."""
        folder = Path(f"{out}.run") / "commits"
        return len(list(folder.iterdir())) if folder.is_dir() else 0

    def windows_begun(self, operations: int) -> int:
        """Number of windows that the undisturbed run had begun after its first `operations` durable operations."""
        return sum(name == "make_folder" and path.endswith("tmp/parts") for name, path in self.operations[:operations])

    def finishes(self, out: Path, *more: Any, begun: int | None = None, keep: bool = False) -> int:
        """Check that a run survived its faults, by finishing it.

        `check --read-data` must find no problem. The same command must finish the run with exactly the windows that were not committed.
        The files of the result and of parts/ must be identical to those of the undisturbed run, and no other file may be left.

        Args:
            out: the folder OUT.
            more: further arguments of the command.
            begun: number of windows that the run had begun; None if it is not known.
            keep: keep the result and the run directory, which are deleted otherwise.

        Returns:
            Number of windows that were begun and had to be quantized again, at most 1; 0 if `begun` is None.
        """
        run, committed = Path(f"{out}.run"), self.committed(out)
        if (run / "ROLLBACK").exists():
            committed = min(committed, json.loads((run / "ROLLBACK").read_text())["windows"])
        if (run / "run.json").exists():
            looked = self.run(["check", str(run), "--read-data"])
            assert looked.code == 0, looked.err
        ended = self.run(self.quantize(out, *more))
        assert ended.code == 0, ended.err
        assert ended.windows == WINDOWS - committed
        assert files_of(out) == self.expected
        assert files_of(run / "parts") == self.expected_parts
        assert sorted(path.name for path in run.iterdir()) == ["LOCK", "acts", "commits", "parts", "run.json", "tmp"]
        assert not list((run / "tmp").iterdir())
        assert not list((run / "acts").iterdir())
        assert not list(out.parent.glob(f"{out.name}.*cbqstream*"))
        redone = 0 if begun is None else begun - committed
        assert redone <= 1
        if not keep:
            shutil.rmtree(out)
            shutil.rmtree(run)
        return redone

    def stopped(self, out: Path, windows: int) -> Path:
        """Start a run, stop it after `windows` windows, and return its run directory."""
        ended = self.run(self.quantize(out, "--stop-after-window", windows))
        assert ended.code == 75, ended.err
        return Path(f"{out}.run")


def one_line(text: str) -> bool:
    """Whether standard error is one line that begins like an error of cbqstream."""
    return text.startswith("cbqstream: error: ") and text.count("\n") == 1


def sleep_until(condition: Any, seconds: float = 20) -> None:
    """Wait until `condition()` is true; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition was not met in {seconds} s"
        time.sleep(0.002)
