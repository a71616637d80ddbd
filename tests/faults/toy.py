"""A small run, the process that runs it again and again, and the one oracle of all fault tests."""

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
"""All counts instead of those of every change; see tools/nightly.sh."""
SAMPLES = 4
WINDOWS = 3
STEPS = 4
"""Of training in a window: enough to make every window better, so that what was learned is in every byte that is compared."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (or minus the signal), what it said, and how long it took."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def windows(self) -> int:
        """How many windows it finished."""
        return len(re.findall(r"^window \d", self.out, re.MULTILINE))


class Toy:
    """A model, tokens, and a server that forks a process for each command line."""

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
        """A name for an output that is not used yet."""
        self._number += 1
        return self.folder / f"out-{self._number}"

    def quantize(self, out: Path, *more: Any, model: Path | None = None) -> list[str]:
        """The command line of the run."""
        sizes = ["--num-samples", SAMPLES, "--seq-len", SEQ_LEN, "--group-size", 32, "--batch-size", 4]
        where = ["--threads", 1, "--device", "cpu", "--epochs", STEPS, "--dataset", self.tokens]
        return [str(value) for value in ("quantize", model or self.model, out, *sizes, *where, *more)]

    def start(self, arguments: list[str], **fault: Any) -> int:
        """Begin a process, see server.py for `fault`; its number is for `wait`."""
        return self._ask({"arguments": arguments, **fault})["number"]

    def wait(self, number: int) -> Ended:
        """Its end; that so few segments leave none to be held out is said in every run, and is not looked at."""
        answer = self._ask({"wait": number})
        lines = answer["out"].splitlines(keepends=True)
        return Ended(**answer | {"out": "".join(line for line in lines if not line.startswith(f"note: of {SAMPLES} "))})

    def signal(self, number: int, which: int) -> None:
        """Send a signal to a process that was begun."""
        self._ask({"signal": which, "number": number})

    def run(self, arguments: list[str], **fault: Any) -> Ended:
        """A process from its start to its end."""
        return self.wait(self.start(arguments, **fault))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(request, default=str), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        assert answer, "the server is gone"
        return json.loads(answer)

    def committed(self, out: Path) -> int:
        """Windows that a run holds."""
        folder = Path(f"{out}.run") / "commits"
        return len(list(folder.iterdir())) if folder.is_dir() else 0

    def windows_begun(self, operations: int) -> int:
        """How many windows the undisturbed run had begun before it did operation number `operations`."""
        return sum(name == "make_folder" and path.endswith("tmp/parts") for name, path in self.operations[:operations])

    def finishes(self, out: Path, *more: Any, begun: int | None = None, keep: bool = False) -> int:
        """The oracle: what is on disk is sound, the same command ends it, with the same bytes, and leaves nothing else.

        Returns:
            How many of the `begun` windows had to be done again.
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
        """A run directory that holds this many windows."""
        ended = self.run(self.quantize(out, "--stop-after-window", windows))
        assert ended.code == 75, ended.err
        return Path(f"{out}.run")


def one_line(text: str) -> bool:
    """Whether an error is one line in our form."""
    return text.startswith("cbqstream: error: ") and text.count("\n") == 1


def sleep_until(condition: Any, seconds: float = 20) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)
