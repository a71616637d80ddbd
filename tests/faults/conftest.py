"""What all fault tests share: a toy run, how often things are tried, and the tally that becomes README.md."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from toy import NIGHTLY, Toy

TALLY = os.environ.get("CBQSTREAM_FAULT_TALLY")
"""A file to which each test adds a line of JSON."""


class Tally:
    """Counts of one row of the table in README.md."""

    def __init__(self, row: int, what: str) -> None:
        self.counts = {"row": row, "what": what, "runs": 0, "faults": 0, "lost": 0, "redone": None}

    def add(self, *, runs: int = 1, faults: int = 1, redone: int | None = None) -> None:
        """Count; `redone` is the number of windows that were done twice, where it was counted."""
        self.counts["runs"] += runs
        self.counts["faults"] += faults
        if redone is not None:
            self.counts["redone"] = max(self.counts["redone"] or 0, redone)


@pytest.fixture
def tally(request):
    """A context manager: counts of a row, kept when the test passes."""

    @contextmanager
    def keep(row: int, what: str) -> Iterator[Tally]:
        began, counted = time.monotonic(), Tally(row, what)
        yield counted
        assert counted.counts["faults"], "nothing was tried"
        if TALLY:
            seconds = round(time.monotonic() - began, 1)
            with Path(TALLY).open("a") as file:
                file.write(
                    json.dumps({"test": request.node.nodeid, **counted.counts, "seconds": seconds, "nightly": NIGHTLY})
                    + "\n"
                )

    return keep


@pytest.fixture
def tmpfs(tmp_path):
    """A function that mounts a file system of its own with some options, and gives its folder."""
    mounted = []

    def mount(options: str) -> Path:
        place = tmp_path / f"tmpfs-{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("may not mount a tmpfs")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Iterator[Toy]:
    """A run of three windows that takes a fraction of a second, and what it must give."""
    made = Toy(tmp_path_factory.mktemp("toy"))
    yield made
    made.close()
