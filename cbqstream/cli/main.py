"""The entry point. Flags may be written with - or _, and an expected error is one line and an exit code."""

import sys
from typing import NoReturn

from cbqstream.cli import making, results, runs  # noqa: F401  # registers their commands
from cbqstream.cli.app import app, dashed, fail
from cbqstream.errors import CbqstreamError, DeviceMemoryError, StoppedError, StorageError
from cbqstream.runtime.interruption import Interrupted, interrupt_on_signals


def main() -> NoReturn:
    """Run the command line, and exit."""
    try:
        interrupt_on_signals()  # inside: a signal may arrive before both handlers are set, or while an error is printed
        _answer([dashed(argument) for argument in sys.argv[1:]])
    except Interrupted as stop:
        fail(str(stop), StoppedError.exit_code)
    sys.exit(0)


def _answer(arguments: list[str]) -> None:
    try:
        app(arguments)
    except CbqstreamError as error:
        fail(str(error), error.exit_code)
    except (MemoryError, RuntimeError) as error:
        from cbqstream.runtime.memory import is_out_of_memory  # not at the start, which it would slow down

        if not is_out_of_memory(error):
            raise
        fail("out of memory. Close other programs, or use a smaller --batch-size.", DeviceMemoryError.exit_code)
    except OSError as error:
        fail(
            f"{'' if error.filename is None else f'{error.filename}: '}{error.strerror or error}.",
            StorageError.exit_code,
        )
