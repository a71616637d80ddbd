"""Fixtures of the fault tests: the toy run, a mounted tmpfs, and the tally from which the table of README.md is made."""

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
"""File to which each test that passes appends a line of JSON with its counts; None if no counts are kept."""


class Tally:
    """Counts of one test for one row of the table in README.md.

    Args:
        row: number of the row.
        what: description of the fault in the row.
    """

    def __init__(self, row: int, what: str) -> None:
        self.counts = {"row": row, "what": what, "runs": 0, "faults": 0, "lost": 0, "redone": None}

    def add(self, *, runs: int = 1, faults: int = 1, redone: int | None = None) -> None:
        """Add to the counts.

        Args:
            runs: number of runs.
            faults: number of faults in these runs.
            redone: number of windows that were quantized twice; None if it is not known.
        """
        self.counts["runs"] += runs
        self.counts["faults"] += faults
        if redone is not None:
            self.counts["redone"] = max(self.counts["redone"] or 0, redone)


@pytest.fixture
def tally(request):
    """A context manager that yields a `Tally` for a row, and writes its counts to the file of tallies if the test passes."""

    @contextmanager
    def keep(row: int, what: str) -> Iterator[Tally]:
        began, counted = time.monotonic(), Tally(row, what)
        yield counted
        assert counted.counts["faults"], "no fault was counted"
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
    """A function that mounts a tmpfs with the given mount options and returns its folder.

    The test is skipped if mounting is not permitted.
    """
    mounted = []

    def mount(options: str) -> Path:
        place = tmp_path / f"tmpfs-{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not permitted")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Iterator[Toy]:
    """The toy run: three windows that take a fraction of a second, and the files that they must produce."""
    made = Toy(tmp_path_factory.mktemp("toy"))
    yield made
    made.close()
