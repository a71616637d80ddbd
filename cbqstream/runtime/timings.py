"""Timings of a run: seconds that its main thread spends waiting for reads and for writes."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cbqstream.disk import Activity


@dataclass(frozen=True, slots=True)
class Clock:
    """A moment: seconds of a monotonic clock, and seconds spent reading and writing until then."""

    time: float
    reading: float
    writing: float

    def since(self, other: "Clock") -> "Clock":
        """Seconds between two moments."""
        return Clock(self.time - other.time, self.reading - other.reading, self.writing - other.writing)


class Timings:
    """The one owner of the timings of a run. It measures the thread that makes it; work of other threads counts where it waits for them.

    `measure` is passed to what reads and writes: the disk, the activation stores and the source checkpoint.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._seconds: dict[Activity, float] = {"reading": 0.0, "writing": 0.0}

    @contextmanager
    def measure(self, activity: Activity) -> Iterator[None]:
        """Count the time of a `with` as reading or writing, if the main thread spends it."""
        began = time.monotonic()
        try:
            yield
        finally:
            if threading.get_ident() == self._thread:
                self._seconds[activity] += time.monotonic() - began

    def now(self) -> Clock:
        """This moment."""
        return Clock(time.monotonic(), self._seconds["reading"], self._seconds["writing"])
