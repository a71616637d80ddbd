"""Settings from the flags of the command line."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from cbqstream.config import CalibrationConfig, QuantizeConfig, Scheme, parse_bytes
from cbqstream.errors import UsageError
from cbqstream.profiles import PROFILES, Profile

_PER_CHANNEL = -1
_AS_THEY_ARE = ("blocks_path", "quantize_lm_head", "keep_first", "keep_last", "seed")


def config_of(said: dict[str, Any]) -> QuantizeConfig:
    """The settings of a run, from the flags of `quantize` by name."""
    if said["profile"] not in PROFILES:
        raise UsageError(f"profile {said['profile']!r} is not {', '.join(PROFILES)}.")
    parts = PROFILES[said["profile"]]
    size = said["group_size"]
    own = {name: said[name] for name in (*_AS_THEY_ARE, "device", "threads")}
    own |= {name: tuple(said[name] or ()) for name in ("ignore", "override")}
    own |= {name: parse_bytes(said[name]) for name in ("max_ram", "max_vram") if said[name] is not None}
    return QuantizeConfig(
        model=said["model"],
        out=_absolute(said["out"]),
        run_dir=None if said["run_dir"] is None else _absolute(said["run_dir"]),
        scheme=Scheme.named(
            said["scheme"],
            group_size=None if size == _PER_CHANNEL else size,
            symmetric=said["symmetric"],
            activation_strategy=said["activation_strategy"],
        ),
        calibration=CalibrationConfig(
            dataset=_absolute(said["dataset"]),
            num_samples=said["num_samples"],
            seq_len=said["seq_len"],
            all_experts=said["calibrate_all_experts"],
        ),
        window=_changed(parts.window, {"size": said["window_size"], "overlap": said["overlap"]}),
        outliers=_changed(parts.outliers, {name.removeprefix("cfp_"): said[name] for name in said if "cfp_" in name}),
        reconstruction=_changed(parts.reconstruction, said),
        **own,
    )


def recipe_of(config: QuantizeConfig) -> str:
    """A recipe, as `recipe.py` reads it, with every setting that results depend on but threads and device: the inverse of `config_of`."""
    scheme, calibration = config.scheme, config.calibration
    said = {
        "scheme": scheme.name,
        "group_size": scheme.group_size or _PER_CHANNEL,
        "symmetric": scheme.symmetric,
        "activation_strategy": scheme.activation_strategy,
        "num_samples": calibration.num_samples,
        "seq_len": calibration.seq_len,
        "calibrate_all_experts": calibration.all_experts,
        **flags_of(config),
        **{name: getattr(config, name) for name in (*_AS_THEY_ARE, "ignore", "override")},
    }
    lines = [(name.replace("_", "-"), value) for name, value in said.items() if value not in (None, ())]
    return "".join(f"{flag} = {json.dumps(value)}\n" for flag, value in lines)  # such JSON is TOML too


def flags_of(parts: Profile | QuantizeConfig) -> dict[str, Any]:
    """What a profile sets, by flag."""
    return {
        "window_size": parts.window.size,
        "overlap": parts.window.overlap,
        **{f"cfp_{name}": value for name, value in asdict(parts.outliers).items()},
        **asdict(parts.reconstruction),
    }


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _changed(settings: Any, said: dict[str, Any]) -> Any:
    """Settings of a profile with what was said on the command line in their place."""
    names = {field.name for field in fields(settings)}
    return replace(settings, **{name: value for name, value in said.items() if name in names and value is not None})
