"""Fields of the settings dataclasses, and checks of their names and values."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import MISSING, field
from typing import Any, Literal, get_args

from cbqstream.errors import UsageError

Panel = Literal["Model and output", "Calibration", "Method", "Limits", "Run"]
"""Groups in which the command line shows the flags."""


def setting(
    default: Any = MISSING,
    *,
    help: str,
    panel: Panel = "Method",
    flag: str | None = None,
    method: str | None = None,
    from_factory: Any = MISSING,
) -> Any:
    """A field of a settings dataclass.

    Args:
        default: value of the field; none is a required field.
        help: description, one sentence without a full stop unless there are two.
        panel: group in which the command line shows the flag.
        flag: name of the flag, with _; the name of the field by default. An empty string: the field has no flag of its own.
        method: the rounding method that alone uses the field.
        from_factory: called for a default that is made anew each time.
    """
    metadata = {
        "help": help if method is None else f"{method}: {help}",
        "panel": panel,
        "flag": flag,
        "method": method,
    }
    if from_factory is not MISSING:
        return field(default_factory=from_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The known name nearest to an unknown one, as " (NAME?)" for an error message; empty if no name is near."""
    nearest = difflib.get_close_matches(name, known, 1)
    return f" ({nearest[0]}?)" if nearest else ""


def require(ok: bool, message: str) -> None:  # noqa: FBT001
    """Raise a UsageError with a message unless a condition holds."""
    if not ok:
        raise UsageError(message)


def require_choice(settings: Any, name: str, choices: Any) -> None:
    """Refuse a field whose value is not one of a Literal.

    Raises:
        UsageError: it is not.
    """
    value, known = getattr(settings, name), get_args(choices)
    if value not in known:
        raise UsageError(f"{name} {value!r} is not {', '.join(known[:-1])} or {known[-1]}.")


def require_device(name: str) -> None:
    """Refuse a name that is not that of a device.

    Raises:
        UsageError: it is not.
    """
    require(re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is not None, f"device {name!r} is not auto, cpu or cuda.")


def require_at_least(settings: Any, least: int, *names: str) -> None:
    """Refuse fields with values below `least`.

    Raises:
        UsageError: one is.
    """
    for name in names:
        value = getattr(settings, name)
        require(value >= least, f"{name} is {value}. It must be at least {least}.")
