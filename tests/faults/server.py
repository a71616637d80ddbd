"""Server that runs `cbqstream` command lines, each in a forked process that need not import torch first.

Requests and answers are lines of JSON. A request has `arguments`, and may have:

    at, kind            a fault before durable operation number `at`: "kill" (SIGKILL), "signal" (the signal `which`), "memory"
                        (MemoryError), or the name of an errno
    file_size           largest size of a file in bytes
    umask               umask of the process
    patch               name of a function in patches.py, called before the command
    count               file to which the names and paths of the durable operations are written at the end
"""

import errno
import json
import os
import resource
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import patches
import torch

from cbqstream import disk
from cbqstream.cli import main as command
from cbqstream.disk import Disk
from cbqstream.evaluation import perplexity  # noqa: F401
from cbqstream.report import progress, status  # noqa: F401
from cbqstream.run import pipeline

torch.set_num_threads(1)


class Fault:
    """Observer of the disk that records the durable operations and causes the requested fault before one of them."""

    def __init__(self, request: dict) -> None:
        self.request = request
        self.seen: list[tuple[str, str]] = []

    def __call__(self, number: int, name: str, path: Path) -> None:
        self.seen.append((name, str(path)))
        if number != self.request.get("at"):
            return
        kind = self.request["kind"]
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "signal":
            os.kill(os.getpid(), self.request["which"])
        elif kind == "memory":
            raise MemoryError
        else:
            code = getattr(errno, kind)
            raise OSError(code, os.strerror(code))


def work(request: dict, out: Path, err: Path) -> None:
    """Run a command line in the forked process, with its output in the files `out` and `err`, and exit."""
    for stream, file in ((1, out), (2, err)):
        handle = os.open(file, os.O_WRONLY)
        os.dup2(handle, stream)
    sys.stdin.close()
    fault = Fault(request)
    pipeline.Disk = disk.Disk = partial(Disk, fault)
    if "patch" in request:
        getattr(patches, request["patch"])()
    if "file_size" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], request["file_size"]))
    if "umask" in request:
        os.umask(request["umask"])
    sys.argv = ["cbqstream", *request["arguments"]]
    code = 1
    try:
        command.main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    if "count" in request:
        Path(request["count"]).write_text(json.dumps(fault.seen))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Answer requests until standard input ends."""
    running: dict[int, tuple[Path, Path, float]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            number = request["wait"]
            out, err, began = running.pop(number)
            _, status = os.waitpid(number, 0)
            seconds = time.monotonic() - began
            answer = {"code": os.waitstatus_to_exitcode(status), "seconds": seconds}
            answer |= {"out": out.read_text(), "err": err.read_text()}
            out.unlink()
            err.unlink()
        elif "signal" in request:
            os.kill(request["number"], request["signal"])
            answer = {}
        else:
            folder = Path(os.environ.get("TMPDIR", "/tmp"))
            names = [
                folder / f"faults-{os.getpid()}-{len(running)}-{time.monotonic_ns()}.{part}" for part in ("out", "err")
            ]
            for name in names:
                name.touch()
            number = os.fork()
            if not number:
                work(request, *names)
            running[number] = (*names, time.monotonic())
            answer = {"number": number}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
