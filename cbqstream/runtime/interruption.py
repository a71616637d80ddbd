"""What SIGINT and SIGTERM do: leave at once, because what is committed is safe wherever they strike."""

import os
import signal
import warnings
from types import FrameType
from typing import NoReturn

_STOPPING = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """SIGINT or SIGTERM. Not an Exception, so that no library takes it for an error of its own and goes on."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """What is committed is safe wherever a signal strikes, so leave at once; a second one does not even wait for tmp/ to be emptied."""
    for other in _STOPPING:
        signal.signal(other, lambda number, frame: os._exit(128 + number))
    warnings.simplefilter("ignore")  # Zarr's coroutines complain that nobody waits for them any more
    raise Interrupted(f"stopped by {signal.Signals(number).name}.")


def interrupt_on_signals() -> None:
    """From now on both raise `Interrupted`; after the first one the next leaves without waiting for anything, with 128 and its number."""
    for number in _STOPPING:
        signal.signal(number, _stop)
