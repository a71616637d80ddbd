"""A process that is gone, as far as the run directory can tell."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cbqstream import quantize
from cbqstream.config import QuantizeConfig
from cbqstream.disk import Disk
from cbqstream.rundir.chain import Chain


class KilledError(BaseException):
    """Stands for a process that is gone."""


def windows_committed(run: Path) -> int:
    """How many windows and epochs a run directory holds."""
    return Chain.read(run).next_window if (run / "run.json").exists() else 0


def quantize_until(config: QuantizeConfig, stop: Callable[[int, str, Path], bool]) -> None:
    """Quantize, and die before the first durable operation of which `stop(number, name, path)` is true."""

    dead = False

    def die(number: int, name: str, path: Path) -> None:
        nonlocal dead
        dead = dead or stop(number, name, path)
        if dead:  # it does not clean up either
            raise KilledError

    with pytest.raises(KilledError):
        quantize(config, disk=Disk(die))
