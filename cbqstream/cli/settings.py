"""Flags of `quantize` and `plan`, generated from the options, and the recipe that gives defaults for them."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperOption

from cbqstream.config import QuantizeConfig
from cbqstream.options import OPTIONS, Option, config_from_options, profile_defaults
from cbqstream.profiles import PROFILES
from cbqstream.recipe import read_recipe
from cbqstream.setting import Panel

_ARGUMENTS = ("model", "out")
_PROFILE_HELP = "paper, fast, default or accurate. Single flags change parts of a profile; defaults in parentheses are those of `default`"
_RECIPE_HELP = "TOML file with flags, such as group-size = 64; flags on the command line take precedence"
_DEFAULTS = profile_defaults(PROFILES["default"])


def _take_recipe(context: typer.Context, recipe: Path | None) -> None:
    """Callback of `--recipe` that makes the values of a recipe the defaults of their flags."""
    if recipe is not None:
        flags = {parameter.name or "": parameter for parameter in context.command.params}
        found = read_recipe(recipe, [name for name, flag in flags.items() if isinstance(flag, TyperOption)])
        repeated = [name for name in found if getattr(flags[name], "multiple", False)]
        lists = {name: [value] for name in repeated if isinstance(value := found[name], str)}
        context.default_map = {**(context.default_map or {}), **found, **lists}


def _shown(name: str, default: Any) -> str:
    """Default of an option as the help shows it: the value, or the name of the flag if it is a bool."""
    if not isinstance(default, bool):
        return str(default)
    flag = name.replace("_", "-")
    return flag if default else f"no-{flag}"


def _parameter(option: Option, *, optional: bool) -> inspect.Parameter:
    """Parameter of a command for an option.

    Args:
        option: the option.
        optional: whether OUT and --dataset may be left out.
    """
    text = f"{option.help}."
    required = option.required and not (optional and option.name != "model")
    default = None if option.kind is list[str] else option.default
    kind: Any = option.kind if required or default is not None else option.kind | None
    if option.name in _ARGUMENTS:
        info: Any = typer.Argument(help=text, metavar=option.name.upper())
    else:
        shown = _shown(option.name, _DEFAULTS[option.name]) if option.has_profile_default else True
        info = typer.Option(help=text, rich_help_panel=option.panel, show_default=shown)
    return _keyword(option.name, inspect.Parameter.empty if required else default, Annotated[kind, info])


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def with_settings(command: Callable[..., None], *, optional: bool = False) -> Callable[..., None]:
    """Make a command with the flags of all options, `--profile` and `--recipe`, followed by the flags of the given command.

    Args:
        command: function with its own flags as keyword arguments, and with the argument `settings`, the values of the other flags by name.
        optional: whether OUT and --dataset may be left out.
    """
    own = [
        parameter
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
        if name != "settings"
    ]
    profile = typer.Option(help=f"{_PROFILE_HELP}.", rich_help_panel="Method")
    recipe = typer.Option(help=f"{_RECIPE_HELP}.", rich_help_panel="Run", is_eager=True, callback=_take_recipe)
    panels: dict[str, list[inspect.Parameter]] = {panel: [] for panel in get_args(Panel)}
    panels["Method"].append(_keyword("profile", "default", Annotated[str, profile]))
    panels["Run"].append(_keyword("recipe", None, Annotated[Path | None, recipe]))
    for option in OPTIONS.values():
        panels[option.panel].append(_parameter(option, optional=optional))
    parameters = [*(parameter for panel in panels.values() for parameter in panel), *own]  # the help has this order
    own_names = {parameter.name for parameter in own}

    def run(**values: Any) -> None:
        settings = {name: value for name, value in values.items() if name not in own_names and name != "recipe"}
        command(settings=settings, **{name: values[name] for name in own_names})

    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def config_of(settings: Mapping[str, Any]) -> QuantizeConfig:
    """Settings of a run from the values of the flags, by name.

    Raises:
        UsageError: a value cannot work.
    """
    values = dict(settings)
    return config_from_options(values, values.pop("profile"))
