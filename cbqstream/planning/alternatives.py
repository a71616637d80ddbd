"""Smaller settings, which a plan suggests for a run that does not fit or takes too long."""

from dataclasses import replace

from cbqstream.config import QuantizeConfig
from cbqstream.planning.sizes import ModelSizes
from cbqstream.rounding.registry import METHODS, method_of

_SHAPE = 4096, 4096
"""[O, I] of the layer for which the memory of rounding methods is compared."""


def smaller_settings(config: QuantizeConfig, sizes: ModelSizes) -> dict[str, QuantizeConfig]:
    """Settings that need less memory, traffic or time, by the flags that select them. Those that change the result least come first.

    Args:
        config: settings of the run.
        sizes: sizes of the model.
    """
    settings, calibration, method = config.reconstruction, config.calibration, method_of(config.reconstruction)
    others = {}
    if settings.batch_size > 1:
        half = settings.batch_size // 2
        others[f"--batch-size {half}"] = replace(config, reconstruction=replace(settings, batch_size=half))
    if sizes.routed is not None and settings.experts == "window":
        alone = replace(settings, experts="alone", kl_weight=0.0, end_to_end_epochs=0)
        others[_alone(config)] = replace(config, reconstruction=alone, window=replace(config.window, size=1, overlap=0))
    for name, other in METHODS.items():
        less = other.cost(settings, *_SHAPE).resident_bytes < method.cost(settings, *_SHAPE).resident_bytes
        if method.learns and (other.learns or other.closed_form) and less:
            one = replace(config.window, size=1, overlap=0) if other.closed_form else config.window
            flags = f"--rounding {name}" + (" --window-size 1 --overlap 0" if one != config.window else "")
            others[flags] = replace(config, reconstruction=replace(settings, rounding=other.name), window=one)
    others |= _windows_of_one(config)
    if calibration.seq_len > 512:
        half = calibration.seq_len // 2
        others[f"--seq-len {half}"] = replace(config, calibration=replace(calibration, seq_len=half))
    if calibration.num_samples > 32:
        half = calibration.num_samples // 2
        others[f"--num-samples {half}"] = replace(config, calibration=replace(calibration, num_samples=half))
    if settings.end_to_end_epochs and method.learns:
        others["--end-to-end-epochs 0"] = replace(config, reconstruction=replace(settings, end_to_end_epochs=0))
    if settings.epochs > 1 and method.learns:
        half = settings.epochs // 2
        others[f"--epochs {half}"] = replace(config, reconstruction=replace(settings, epochs=half))
    return others


def _alone(config: QuantizeConfig) -> str:
    """Flags that reconstruct experts alone."""
    settings, flags = config.reconstruction, ["--experts alone"]
    flags += ["--window-size 1 --overlap 0"] if config.window.size > 1 else []
    flags += ["--kl-weight 0"] if settings.kl_weight else []
    return " ".join(flags + (["--end-to-end-epochs 0"] if settings.end_to_end_epochs else []))


def _windows_of_one(config: QuantizeConfig) -> dict[str, QuantizeConfig]:
    """Settings with windows of one block, which may stay in memory where two do not."""
    settings = config.reconstruction
    if config.window.size == 1:
        return {}
    one = replace(config, window=replace(config.window, size=1, overlap=0))
    found = {"--window-size 1 --overlap 0": one}
    if settings.batch_size > 1:
        smallest = replace(one, reconstruction=replace(settings, batch_size=1))
        found["--window-size 1 --overlap 0 --batch-size 1"] = smallest
    return found
