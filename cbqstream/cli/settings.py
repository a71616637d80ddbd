"""Flags of `quantize` and `plan`, generated from the options, and the recipe that gives defaults for them."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperOption

from cbqstream.config import QuantizeConfig
from cbqstream.options import OPTIONS, Option, config_from_options, profile_defaults
from cbqstream.profiles import PROFILES
from cbqstream.recipe import read_recipe

_ARGUMENTS = ("model", "out")
_PROFILE_HELP = (
    "paper, fast, default or accurate. Single flags change parts of a profile; defaults shown are of `default`"
)
_RECIPE_HELP = "TOML file with flags, such as group-size = 64; flags on the command line take precedence"
_DEFAULTS = profile_defaults(PROFILES["default"])


def _take_recipe(context: typer.Context, recipe: Path | None) -> None:
    """Make the values of a recipe the defaults of their flags."""
    if recipe is not None:
        flags = {parameter.name or "": parameter for parameter in context.command.params}
        found = read_recipe(recipe, [name for name, flag in flags.items() if isinstance(flag, TyperOption)])
        repeated = [name for name in found if getattr(flags[name], "multiple", False)]
        lists = {name: [value] for name in repeated if isinstance(value := found[name], str)}
        context.default_map = {**(context.default_map or {}), **found, **lists}


def _parameter(option: Option, *, optional: bool) -> inspect.Parameter:
    """The parameter of a command for an option."""
    text = f"{option.help}."
    kind: Any = option.kind if option.default is not None and option.kind is not list[str] else option.kind | None
    default = None if option.kind is list[str] else option.default
    required = option.name in ("model", "out", "dataset") and not (optional and option.name != "model")
    if option.name in _ARGUMENTS:
        info: Any = typer.Argument(help=text)
        kind = str if required else str | None
    else:
        shown = str(_DEFAULTS[option.name]) if option.has_profile_default else True
        info = typer.Option(help=text, rich_help_panel=option.panel, show_default=shown)
    if option.name == "scheme":
        kind, default = str, "W4A16"
    if required:
        kind, default = str, inspect.Parameter.empty
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def with_settings(command: Callable[..., None], *, optional: bool = False) -> Callable[..., None]:
    """Give a command the flags of all options, `--profile` and `--recipe`, before its own.

    Args:
        command: takes its own flags by name, and `settings`, the values of the others by name.
        optional: whether OUT and --dataset may be left out.
    """
    own = [
        parameter
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
        if name != "settings"
    ]
    extra = {
        "profile": (str, "default", typer.Option(help=f"{_PROFILE_HELP}.", rich_help_panel="Method")),
        "recipe": (
            Path | None,
            None,
            typer.Option(help=f"{_RECIPE_HELP}.", rich_help_panel="Run", is_eager=True, callback=_take_recipe),
        ),
    }
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])
        for name, (kind, default, info) in extra.items()
    ]
    options = [_parameter(option, optional=optional) for option in OPTIONS.values()]
    first = [parameter for parameter in options if parameter.name in _ARGUMENTS]
    parameters = [*first, *more, *(parameter for parameter in options if parameter.name not in _ARGUMENTS), *own]
    own_names = {parameter.name for parameter in own}

    def run(**values: Any) -> None:
        settings = {name: value for name, value in values.items() if name not in own_names and name != "recipe"}
        command(settings=settings, **{name: values[name] for name in own_names})

    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def config_of(settings: Mapping[str, Any]) -> QuantizeConfig:
    """The settings of a run, from the values of the flags.

    Raises:
        UsageError: a value cannot work.
    """
    values = dict(settings)
    return config_from_options(values, values.pop("profile"))
