"""Simulated kills: a run that stops between two operations on disk and leaves the run directory as a killed process leaves it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cbqstream import quantize
from cbqstream.config import QuantizeConfig
from cbqstream.disk import Disk
from cbqstream.rundir.chain import Chain


class KilledError(BaseException):
    """Raised in place of a kill. The package does not handle it."""


def windows_committed(run: Path) -> int:
    """Number of windows and epochs that are committed in a run directory."""
    return Chain.read(run).next_window if (run / "run.json").exists() else 0


def quantize_until(config: QuantizeConfig, stop: Callable[[int, str, Path], bool]) -> None:
    """Quantize, and simulate a kill before the first operation on disk for which `stop(number, name, path)` is true."""

    dead = False

    def die(number: int, name: str, path: Path) -> None:
        nonlocal dead
        dead = dead or stop(number, name, path)
        if dead:  # a killed process does not clean up, so every later operation fails too
            raise KilledError

    with pytest.raises(KilledError):
        quantize(config, disk=Disk(die))
