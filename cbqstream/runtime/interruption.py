"""Handling of SIGINT and SIGTERM.

The process exits at once, because everything that is committed is safe whenever a signal arrives.
"""

import os
import signal
import warnings
from types import FrameType
from typing import NoReturn

_STOPPING = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived.

    It is not an `Exception`, so that no library handles it as an error of its own and continues.
    """


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Raise `Interrupted`, and let a second signal end the process at once.

    The second signal does not even wait for tmp/ to be emptied.
    """
    for other in _STOPPING:
        signal.signal(other, lambda number, frame: os._exit(128 + number))
    warnings.simplefilter("ignore")  # Zarr warns about coroutines that are no longer awaited
    raise Interrupted(f"stopped by {signal.Signals(number).name}.")


def interrupt_on_signals() -> None:
    """Make SIGINT and SIGTERM raise `Interrupted` from now on.

    After the first signal, the next signal ends the process without waiting for anything. The exit code is then 128 plus its number.
    """
    for number in _STOPPING:
        signal.signal(number, _stop)
