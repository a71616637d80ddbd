"""The entry point of the command line. Flags may be written with `-` or `_`. An expected error prints one line and gives an exit code."""

import sys
from typing import NoReturn

from cbqstream.cli import making, results, runs  # noqa: F401  # registers their commands
from cbqstream.cli.app import app, dashed, fail
from cbqstream.errors import CbqstreamError, DeviceMemoryError, StoppedError, StorageError
from cbqstream.runtime.interruption import Interrupted, interrupt_on_signals


def main() -> NoReturn:
    """Run the command line, and exit."""
    try:
        # inside `try`, because a signal may arrive before both handlers are set, or while an error is printed
        interrupt_on_signals()
        _answer([dashed(argument) for argument in sys.argv[1:]])
    except Interrupted as stop:
        fail(str(stop), StoppedError.exit_code)
    sys.exit(0)


def _answer(arguments: list[str]) -> None:
    """Run a command, and exit with a message if an expected error is raised."""
    try:
        app(arguments)
    except CbqstreamError as error:
        fail(str(error), error.exit_code)
    except (MemoryError, RuntimeError) as error:
        from cbqstream.runtime.memory import is_out_of_memory  # imported here, because it would slow the start down

        if not is_out_of_memory(error):
            raise
        fail("out of memory. Close other programs, or use a smaller --batch-size.", DeviceMemoryError.exit_code)
    except OSError as error:
        fail(
            f"{'' if error.filename is None else f'{error.filename}: '}{error.strerror or error}.",
            StorageError.exit_code,
        )
