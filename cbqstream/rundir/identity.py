"""Identity of a run: the content of its inputs, its settings, and the numerics that its results depend on. Paths are not part of it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from cbqstream.config import QuantizeConfig
from cbqstream.errors import IdentityError
from cbqstream.records import Numerics

FORMAT = 5
"""Format of the run directory."""
ALGORITHM = 5
"""Raised when the same settings give other numbers."""

_NOT_IDENTITY = ("model", "out", "run_dir", "device", "threads", "max_ram", "max_vram")


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that must be unchanged for a run to be resumed."""

    format: int
    algorithm: int
    source_config: str
    """SHA-256 of the content of the source's config.json, in canonical JSON."""
    source_weights: str
    """Fingerprint of the source's tensors, see `Checkpoint.fingerprint`."""
    tokens: str
    """Digest of the calibration segments."""
    settings: Mapping[str, Any]
    """Settings as nested plain values."""
    numerics: Numerics

    @classmethod
    def of(
        cls,
        config: QuantizeConfig,
        *,
        model: Mapping[str, Any],
        weights: str,
        tokens: str,
        numerics: Numerics,
        formats: Sequence[str] = (),
    ) -> Self:
        """The identity of a run.

        Args:
            config: settings of the run.
            model: content of the source's config.json.
            weights: fingerprint of the source's tensors.
            tokens: digest of the calibration segments.
            numerics: what results depend on besides inputs and settings.
            formats: formats of the shards in which older versions, with the same settings, did not write them. They are part of the
                identity, so that one run never holds shards of both.
        """
        settings = {key: value for key, value in config.to_dict().items() if key not in _NOT_IDENTITY}
        settings["calibration"].pop("dataset")
        if formats:
            settings["formats"] = list(formats)
        return cls(FORMAT, ALGORITHM, digest_of(dict(model)), weights, tokens, settings, numerics)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return {
            "format": self.format,
            "algorithm": self.algorithm,
            "source": {"config": self.source_config, "weights": self.source_weights},
            "calibration": {"tokens": self.tokens},
            "settings": dict(self.settings),
            "numerics": asdict(self.numerics),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            KeyError: a field is missing.
            TypeError: a field is unknown, or has another type.
        """
        source, calibration = values["source"], values["calibration"]
        return cls(
            values["format"],
            values["algorithm"],
            source["config"],
            source["weights"],
            calibration["tokens"],
            dict(values["settings"]),
            Numerics(**values["numerics"]),
        )

    def with_numerics(self, numerics: Numerics) -> Self:
        """The identity with other numerics."""
        return replace(self, numerics=numerics)


def canonical(value: Any) -> bytes:
    """The canonical JSON text of a value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def require_same(run: Path, old: Identity, new: Identity) -> None:
    """Refuse to continue a run with another identity.

    Raises:
        IdentityError: the two differ; the message names each field that does, as `field: old -> new`.
    """
    before, after = _flat(old.to_dict()), _flat(new.to_dict())
    changed = [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if changed:
        others = "Restore them, or use another --run-dir"
        if all(field.startswith("numerics.") for field in changed):
            others += ", or continue with --allow-numerics-change: the result is then that of neither machine"
        raise IdentityError(f"{run}: this run has other inputs or settings ({'; '.join(changed)}). {others}.")


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix: json.dumps(value)}
    return {
        key: text
        for name, item in value.items()
        for key, text in _flat(item, f"{prefix}.{name}" if prefix else name).items()
    }
