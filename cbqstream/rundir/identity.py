"""What a run is: the content of its inputs, its settings, and the numerics it depends on. Paths are not part of it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cbqstream.config import QuantizeConfig
from cbqstream.errors import IdentityError

FORMAT = 4
"""Of the run directory."""
ALGORITHM = 5
"""Raised when the same settings give other numbers."""

_NOT_IDENTITY = ("model", "out", "run_dir", "device", "threads", "max_ram", "max_vram")


def identity(
    config: QuantizeConfig, *, model: Mapping[str, Any], weights: str, tokens: str, numerics: Mapping[str, Any]
) -> dict[str, Any]:
    """The identity of a run as nested plain values.

    Args:
        config: its settings.
        model: content of the source's config.json.
        weights: fingerprint of the source's tensors.
        tokens: digest of the calibration segments.
        numerics: see `numerics_class`.
    """
    settings = {key: value for key, value in config.to_dict().items() if key not in _NOT_IDENTITY}
    settings["calibration"].pop("dataset")
    return {
        "format": FORMAT,
        "algorithm": ALGORITHM,
        "source": {"config": digest_of(dict(model)), "weights": weights},
        "calibration": {"tokens": tokens},
        "settings": settings,
        "numerics": dict(numerics),
    }


def canonical(value: Any) -> bytes:
    """The one JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def require_same(run: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to go on with a run that is another one.

    Raises:
        IdentityError: naming each field that differs, old -> new.
    """
    before, after = _flat(old), _flat(new)
    changed = [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if changed:
        others = "Restore them, or use another --run-dir"
        if all(field.startswith("numerics.") for field in changed):
            others += ", or go on with --allow-numerics-change: the result is then that of neither machine"
        raise IdentityError(f"{run}: this run has other inputs or settings ({'; '.join(changed)}). {others}.")


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix: json.dumps(value)}
    return {
        key: text
        for name, item in value.items()
        for key, text in _flat(item, f"{prefix}.{name}" if prefix else name).items()
    }
