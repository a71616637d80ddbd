"""Profiles: frozen sets of settings, by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cbqstream.config import ReconstructionConfig, TransformConfig, WindowConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Settings that belong together, as parts of a `QuantizeConfig`."""

    window: WindowConfig = field(default_factory=WindowConfig)
    transforms: TransformConfig = field(default_factory=TransformConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "paper": Profile(
            transforms=TransformConfig(truncate_weights=True, smoothing="always", smoothing_rule="paper"),
            reconstruction=ReconstructionConfig(
                rounding="lora_rounding",
                init="minmax",
                schedule="cosine",
                epochs=3,
                batch_size=1,
                rounding_lr=1e-4,
                scale_lr=1e-3,
                target_mix=0.5,
                kl_weight=1.0,
                head_weight=0.0,
                token_balance=0.0,
                channel_balance=0.0,
            ),
        ),
        "quick": Profile(
            window=WindowConfig(size=1, overlap=0),
            reconstruction=ReconstructionConfig(rounding="gptq"),
        ),
        "fast": Profile(reconstruction=ReconstructionConfig(epochs=3)),
        "default": Profile(),
        "accurate": Profile(reconstruction=ReconstructionConfig(end_to_end_epochs=2)),
    }
)
"""The profiles. What each costs and gives: `docs/schemes-and-profiles.md` and `benchmarks/README.md`."""
