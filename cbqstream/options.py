"""Options of the command line, generated from the fields of the settings dataclasses, and the settings that they make.

An option has the name, the type, the description and the default of its field. Window, transform and reconstruction settings have the
default of the chosen profile.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cbqstream.config import SECTIONS, CalibrationConfig, QuantizeConfig, parse_bytes
from cbqstream.errors import UsageError
from cbqstream.profiles import PROFILES, Profile
from cbqstream.scheme import Scheme
from cbqstream.setting import Panel, suggestion

_PER_CHANNEL = -1
_OF_PROFILE = ("window", "transforms", "reconstruction")
_NOT_IN_RECIPE = ("model", "out", "dataset", "run_dir", "device", "threads", "max_ram", "max_vram")


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _group_size(size: int) -> int | None:
    return None if size == _PER_CHANNEL else size


_CONVERTED: Mapping[str, Callable[[Any], Any]] = {
    "group_size": _group_size,
    "max_ram": parse_bytes,
    "max_vram": parse_bytes,
    "out": _absolute,
    "run_dir": _absolute,
    "dataset": _absolute,
    "ignore": tuple,
    "override": tuple,
}
"""Functions from the value of an option to the value of its field, where the two differ."""
_KINDS: Mapping[str, type] = {"max_ram": str, "max_vram": str, "scheme": str}
"""Types of options whose type is not that of the field."""
_DEFAULTS: Mapping[str, Any] = {"scheme": "W4A16"}
"""Defaults of options whose field has none."""


@dataclass(frozen=True, slots=True)
class Option:
    """A flag of `quantize` and `plan`."""

    name: str
    """Name with _; the flag has - instead."""
    kind: Any
    """int, float, bool, str or list[str]."""
    help: str
    panel: Panel
    default: Any
    """Value if the flag is not given; None if it is required, or if the profile has the default."""
    required: bool
    """Whether there is no default."""
    method: str | None
    """The rounding method that alone uses the option."""
    section: str | None
    """Field of `QuantizeConfig` that holds the field of the option; None if it is a field of `QuantizeConfig` itself."""
    field: str

    @property
    def has_profile_default(self) -> bool:
        """Whether the profile has the default."""
        return self.section in _OF_PROFILE


def _options_of(cls: Any, section: str | None) -> dict[str, Option]:
    hints, found = get_type_hints(cls), {}
    for item in fields(cls):
        flag = item.metadata["flag"]
        name = item.name if flag is None else flag
        if not name:
            continue
        given = _DEFAULTS.get(name, item.default)
        about = item.metadata
        found[name] = Option(
            name=name,
            kind=_KINDS.get(name) or _kind(hints[item.name]),
            help=about["help"],
            panel=about["panel"],
            default=None if given is MISSING or section in _OF_PROFILE else given,
            required=given is MISSING,
            method=about["method"],
            section=section,
            field=item.name,
        )
    return found


def _kind(hint: Any) -> Any:
    """Type of an option, from the type of its field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _kind(next(argument for argument in arguments if argument is not type(None)))
    if origin is Literal:
        return str
    return list[str] if origin is tuple else hint


OPTIONS: Mapping[str, Option] = MappingProxyType(
    {
        **_options_of(QuantizeConfig, None),
        **{name: option for section, cls in SECTIONS.items() for name, option in _options_of(cls, section).items()},
    }
)
"""All options, by name."""


def config_from_options(values: Mapping[str, Any], profile: str = "default") -> QuantizeConfig:
    """The settings of a run, from options by name. An option that is None is not given.

    Args:
        values: options, which must include `model`, `out` and `dataset`.
        profile: name of the profile that has the defaults.

    Raises:
        UsageError: an option or the profile is unknown, or a value cannot work.
    """
    if profile not in PROFILES:
        raise UsageError(f"profile {profile!r} is not {', '.join(PROFILES)}.")
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    own: dict[str, Any] = {}
    for name, value in values.items():
        if name not in OPTIONS:
            raise UsageError(f"unknown setting {name!r}{suggestion(name, OPTIONS)}.")
        if value is not None:
            option = OPTIONS[name]
            place = own if option.section is None else sections[option.section]
            place[option.field] = _CONVERTED.get(name, _unchanged)(value)
    parts = PROFILES[profile]
    config = QuantizeConfig(
        scheme=Scheme.named(own.pop("scheme", OPTIONS["scheme"].default), **sections["scheme"]),
        calibration=CalibrationConfig(**sections["calibration"]),
        **{section: replace(getattr(parts, section), **sections[section]) for section in _OF_PROFILE},
        **own,
    )
    for name, value in values.items():
        if value is not None and OPTIONS[name].method not in (None, config.reconstruction.rounding):
            used = config.reconstruction.rounding
            raise UsageError(
                f"{name} is a setting of {OPTIONS[name].method}, and the rounding is {used}. Leave it out."
            )
    return config


def _unchanged(value: Any) -> Any:
    return value


def options_of(config: QuantizeConfig) -> dict[str, Any]:
    """The options that make the settings of a run, by name, as plain values: the inverse of `config_from_options`."""
    found = {}
    for name, option in OPTIONS.items():
        place = config if option.section is None else getattr(config, option.section)
        found[name] = getattr(place, option.field)
    return {**found, "scheme": config.scheme.name, "group_size": config.scheme.group_size or _PER_CHANNEL}


def profile_defaults(profile: Profile) -> dict[str, Any]:
    """The defaults that a profile has, by the name of the option."""
    return {
        name: getattr(getattr(profile, option.section), option.field)
        for name, option in OPTIONS.items()
        if option.section is not None and option.has_profile_default
    }


def recipe_of(config: QuantizeConfig) -> str:
    """A recipe in TOML, as `recipe.py` reads it, with every setting on which results depend except threads and device."""
    methods = (None, config.reconstruction.rounding)
    found = {
        name: value
        for name, value in options_of(config).items()
        if name not in _NOT_IN_RECIPE and OPTIONS[name].method in methods
    }
    lines = [(name.replace("_", "-"), value) for name, value in found.items() if value not in (None, ())]
    return "".join(f"{flag} = {json.dumps(value)}\n" for flag, value in lines)  # such JSON is TOML too
