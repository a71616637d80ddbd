"""Smaller settings that a plan offers where a run does not fit, or takes too long."""

from dataclasses import replace

from cbqstream.config import QuantizeConfig


def smaller_settings(config: QuantizeConfig) -> dict[str, QuantizeConfig]:
    """What a user could ask for instead, by the flag."""
    settings, calibration = config.reconstruction, config.calibration
    others = {}
    if settings.batch_size > 1:
        half = settings.batch_size // 2
        others[f"--batch-size {half}"] = replace(config, reconstruction=replace(settings, batch_size=half))
    if settings.rounding == "signround":
        others["--rounding lora_rounding"] = replace(config, reconstruction=replace(settings, rounding="lora_rounding"))
    if calibration.seq_len > 512:
        half = calibration.seq_len // 2
        others[f"--seq-len {half}"] = replace(config, calibration=replace(calibration, seq_len=half))
    if calibration.num_samples > 32:
        half = calibration.num_samples // 2
        others[f"--num-samples {half}"] = replace(config, calibration=replace(calibration, num_samples=half))
    if settings.end_to_end_epochs and settings.rounding != "nearest":
        others["--end-to-end-epochs 0"] = replace(config, reconstruction=replace(settings, end_to_end_epochs=0))
    if config.window.size > 1:
        one = replace(config.window, size=1, overlap=0)
        others["--window-size 1 --overlap 0"] = replace(config, window=one)
    if settings.epochs > 1 and settings.rounding != "nearest":
        half = settings.epochs // 2
        others[f"--epochs {half}"] = replace(config, reconstruction=replace(settings, epochs=half))
    return others
