"""EvaluationOptions a command as a process of its own, with its wall time and its peak resident memory; results that grow row by row."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CALIBRATION = Path(__file__).resolve().parent / "data" / "c4-calibration.jsonl"


@dataclass(frozen=True)
class Measured:
    """What a command printed and what it took."""

    output: str
    seconds: float
    cpu_seconds: float
    """Of all threads. With one thread, the wall time on a core that nothing else uses."""
    peak_rss: int
    """Bytes."""


def run(*command: str, expect: int = 0) -> Measured:
    """Run a command to its end; its standard error goes to ours.

    Raises:
        SystemExit: its exit code is not the one to expect.
    """
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(f"    {line}", end="", file=sys.stderr, flush=True)
        lines.append(line)
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != expect:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    seconds, cpu_seconds = time.monotonic() - began, usage.ru_utime + usage.ru_stime
    return Measured("".join(lines), seconds, cpu_seconds, usage.ru_maxrss * 1024)


def cbqstream(*arguments: str, expect: int = 0) -> Measured:
    """Run the command line of cbqstream."""
    return run(sys.executable, "-m", "cbqstream", *arguments, expect=expect)


def perplexity(measured: Measured) -> float:
    """The number that an evaluation printed."""
    match = re.search(r"perplexity ([\d.]+)", measured.output)
    assert match is not None, measured.output
    return float(match[1])


def cut_tokens(model: Path, path: Path, first: int, stop: int) -> Path:
    """Segments `first` to `stop - 1` of 512 tokens of the C4 text, as token ids in the file `path`, and its path."""
    if not path.exists():
        import numpy as np  # here, because the peak memory of a child process begins with what its parent holds

        from cbqstream.calibration.segments import load_segments

        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        ids = load_segments(CALIBRATION, model, num_samples=stop, seq_len=512, vocab_size=vocabulary)
        np.save(path, ids[first:].numpy())
    return path


def load(results: Path) -> dict[str, dict]:
    """The rows of a result file by name; none if there is no file."""
    return json.loads(results.read_text()) if results.exists() else {}


def save(results: Path, name: str, row: dict) -> None:
    """Add a row to what the file holds now, whoever else adds to it."""
    results.parent.mkdir(exist_ok=True)
    building = results.with_suffix(f".{os.getpid()}")
    building.write_text(json.dumps({**load(results), name: row}, indent=1, sort_keys=True) + "\n")
    building.replace(results)
