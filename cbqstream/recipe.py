"""Recipes: files of settings in TOML, in which each key is a flag of the command line, written with - or _."""

import tomllib
from collections.abc import Sequence
from pathlib import Path

from cbqstream.errors import UsageError, shown
from cbqstream.setting import suggestion

_COMMAND_LINE_ONLY = ("recipe", "help")


def read_recipe(path: Path, flags: Sequence[str]) -> dict[str, str | list[str]]:
    """Read a recipe.

    Args:
        path: the file.
        flags: names of all flags, written with _.

    Returns:
        Values by flag, as they would be written on the command line.

    Raises:
        UsageError: the file cannot be read or is not TOML, a key is not a flag, or a value is not one that a flag can have.
    """
    if path.suffix != ".toml":
        raise UsageError(f"{path}: recipes are TOML (NAME.toml).")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not TOML ({shown(str(error))}).") from error
    known = [flag for flag in flags if flag not in _COMMAND_LINE_ONLY]
    values: dict[str, str | list[str]] = {}
    for key, value in content.items():
        flag = key.replace("-", "_")
        if flag not in known:
            raise UsageError(f'{path}: unknown key "{shown(key)}"{suggestion(flag, known)}.')
        if flag in values:
            raise UsageError(f'{path}: "{key}" appears twice, once with - and once with _.')
        if not all(isinstance(one, (str, int, float)) for one in (value if isinstance(value, list) else [value])):
            raise UsageError(f'{path}: "{key}" is neither a value nor a list of values.')
        values[flag] = [str(one) for one in value] if isinstance(value, list) else str(value)
    return values
