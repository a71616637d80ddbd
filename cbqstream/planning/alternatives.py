"""Smaller settings, which a plan suggests for a run that does not fit or takes too long."""

from dataclasses import replace

from cbqstream.config import QuantizeConfig
from cbqstream.rounding.registry import METHODS, method_of

_SHAPE = 4096, 4096
"""[O, I] of the layer for which the memory of rounding methods is compared."""


def smaller_settings(config: QuantizeConfig) -> dict[str, QuantizeConfig]:
    """Settings that need less memory or time, by the flags that select them."""
    settings, calibration, method = config.reconstruction, config.calibration, method_of(config.reconstruction)
    others = {}
    if settings.batch_size > 1:
        half = settings.batch_size // 2
        others[f"--batch-size {half}"] = replace(config, reconstruction=replace(settings, batch_size=half))
    for name, other in METHODS.items():
        less = other.cost(settings, *_SHAPE).resident_bytes < method.cost(settings, *_SHAPE).resident_bytes
        if method.learns and other.learns and less:
            others[f"--rounding {name}"] = replace(config, reconstruction=replace(settings, rounding=other.name))
    if calibration.seq_len > 512:
        half = calibration.seq_len // 2
        others[f"--seq-len {half}"] = replace(config, calibration=replace(calibration, seq_len=half))
    if calibration.num_samples > 32:
        half = calibration.num_samples // 2
        others[f"--num-samples {half}"] = replace(config, calibration=replace(calibration, num_samples=half))
    if settings.end_to_end_epochs and method.learns:
        others["--end-to-end-epochs 0"] = replace(config, reconstruction=replace(settings, end_to_end_epochs=0))
    if config.window.size > 1:
        one = replace(config.window, size=1, overlap=0)
        others["--window-size 1 --overlap 0"] = replace(config, window=one)
    if settings.epochs > 1 and method.learns:
        half = settings.epochs // 2
        others[f"--epochs {half}"] = replace(config, reconstruction=replace(settings, epochs=half))
    return others
