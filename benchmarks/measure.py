"""Run commands as processes of their own, measure their time and peak resident memory, and store results row by row."""

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
    """Output and costs of a command."""

    output: str
    """Text that the command printed to standard output."""
    seconds: float
    """Wall time."""
    cpu_seconds: float
    """CPU time of all threads. With one thread it is the wall time on an otherwise idle core."""
    peak_rss: int
    """Peak resident memory, bytes."""
    io: dict[str, int]
    """Bytes that the process read and wrote, as /proc/PID/io counts them: `rchar` and `wchar` by its calls, `read_bytes` and `write_bytes`
    from and to the disk."""


def run(*command: str, expect: int = 0) -> Measured:
    """Run a command to its end. Its output is also copied to standard error.

    Args:
        command: program and arguments.
        expect: exit code that counts as success.

    Raises:
        SystemExit: the exit code is not `expect`.
    """
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(f"    {line}", end="", file=sys.stderr, flush=True)
        lines.append(line)
    process.stdout.close()
    os.waitid(
        os.P_PID, process.pid, os.WEXITED | os.WNOWAIT
    )  # the counts of all threads are complete, and can still be read
    counts = (line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
    io = {name: int(value) for name, value in counts}
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != expect:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}, expected {expect}")
    seconds, cpu_seconds = time.monotonic() - began, usage.ru_utime + usage.ru_stime
    return Measured("".join(lines), seconds, cpu_seconds, usage.ru_maxrss * 1024, io)


def cbqstream(*arguments: str, expect: int = 0) -> Measured:
    """Run the command line of cbqstream, see `run`."""
    return run(sys.executable, "-m", "cbqstream", *arguments, expect=expect)


def window_reports(log: Path) -> list[dict]:
    """Reports of the windows in a file that `quantize --log-json` wrote, in order. Reports of epochs are left out."""
    return [line for line in map(json.loads, log.read_text().splitlines()) if "window" in line]


def perplexity(measured: Measured) -> float:
    """The perplexity that an evaluation printed."""
    match = re.search(r"perplexity ([\d.]+)", measured.output)
    assert match is not None, measured.output
    return float(match[1])


def cut_tokens(model: Path, path: Path, first: int, stop: int) -> Path:
    """Write segments `first` to `stop - 1` of 512 tokens of the C4 text as token ids to `path`, if it does not exist.

    Args:
        model: folder with the tokenizer.
        path: a .npy file.
        first: number of the first segment.
        stop: number of the segment after the last.

    Returns:
        `path`.
    """
    if not path.exists():
        import numpy as np  # imported here because the peak memory of a child process starts at the memory of its parent

        from cbqstream.calibration.segments import load_segments

        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        ids = load_segments(CALIBRATION, model, num_samples=stop, seq_len=512, vocab_size=vocabulary)
        np.save(path, ids[first:].numpy())
    return path


def load(results: Path) -> dict[str, dict]:
    """The rows of a result file, by name. Empty if the file does not exist."""
    return json.loads(results.read_text()) if results.exists() else {}


def save(results: Path, name: str, row: dict) -> None:
    """Add or replace one row of a result file. The file is read again first, so that two scripts can add rows to it."""
    results.parent.mkdir(exist_ok=True)
    building = results.with_suffix(f".{os.getpid()}")
    building.write_text(json.dumps({**load(results), name: row}, indent=1, sort_keys=True) + "\n")
    building.replace(results)
