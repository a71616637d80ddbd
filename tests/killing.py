"""A process that is gone, as far as the run directory can tell."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cbqstream import quantize
from cbqstream.config import QuantizeConfig
from cbqstream.disk import Disk


class KilledError(Exception):
    """Stands for a process that is gone."""


def quantize_until(config: QuantizeConfig, stop: Callable[[int, str, Path], bool]) -> None:
    """Quantize, and die before the first durable operation of which `stop(number, name, path)` is true."""

    def die(number: int, name: str, path: Path) -> None:
        if stop(number, name, path):
            raise KilledError

    with pytest.raises(KilledError):
        quantize(config, disk=Disk(die))
