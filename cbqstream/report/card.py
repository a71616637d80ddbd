"""What a finished model says of itself: a model card, and metrics.jsonl. They tell of the run, not of when, where or how fast it ran."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cbqstream.config import QuantizeConfig
from cbqstream.options import recipe_of
from cbqstream.report.facts import grid_in_words

CARD, METRICS = "README.md", "metrics.jsonl"
_COSTS = ("seconds", "reading", "writing", "peak_rss", "peak_vram")


def metrics_lines(reports: Sequence[Mapping[str, Any]]) -> str:
    """A JSON object a line for each window and epoch: what came of it, without what it cost on this machine."""
    return "".join(
        json.dumps({key: value for key, value in report.items() if key not in _COSTS}, sort_keys=True) + "\n"
        for report in reports
    )


def model_card(content: Mapping[str, Any], reports: Sequence[Mapping[str, Any]], original: str) -> str:
    """The model card: what was done, with which settings, and what is known of the result; then the card of the source.

    Args:
        content: of run.json, as the run began.
        reports: of all windows and epochs.
        original: README.md of the source, or nothing. The facts for the Hub at its head, its license among them, stay at the head.
    """
    config, windows = QuantizeConfig.from_dict(dict(content["config"])), content["windows"]
    facts, text = _parted(original)
    identity, (done, epochs) = content["identity"], (reports[:windows], reports[windows:])
    scheme, numerics, calibration = config.scheme, identity["numerics"], identity["calibration"]["tokens"]
    inputs = (
        f"{scheme.activation_bits} bits, {scheme.activation_strategy}" if scheme.activation_bits else "not quantized"
    )
    first, last = done[0]["blocks"][0], done[-1]["blocks"][1] - 1
    losses = [sum(report[key] for report in done) / len(done) for key in ("loss_before", "loss_after")]
    changed = sum(report["changed"] for report in done) / len(done)
    rows = {
        "weights": f"{scheme.num_bits} bits, {grid_in_words(scheme)}",
        "inputs": inputs,
        "quantized": f"blocks {first} to {last}{', and the head' if config.quantize_lm_head else ''}",
        "calibrated on": f"{content['stream'][0]} x {content['stream'][1]} tokens, SHA-256 {calibration}",
        "weights of the source": f"fingerprint {identity['source']['weights']}",
        "loss of a window": f"{losses[0]:.4g} at first, {losses[1]:.4g} learned (mean of {windows}, on the segments of the held_out)",
        "codes moved from the nearest": f"{changed:.2%}",
    }
    if epochs:
        rows["divergence end to end"] = f"{epochs[0]['loss_before']:.4g} before, {epochs[-1]['loss_after']:.4g} after"
    rows["made with"] = (
        f"cbqstream {content.get('version', 'unknown')}, torch {numerics['torch']}, transformers {numerics['transformers']}"
    )
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return (
        f"{facts}# Quantized to {scheme.name}\n\n"
        "By Cross-Block Quantization (arXiv 2312.07950), with cbqstream.\n\n"
        f"| | |\n|---|---|\n{table}\n"
        "`metrics.jsonl` has every window and layer. To make it again:\n\n"
        "    cbqstream quantize MODEL OUT --dataset DATASET --recipe recipe.toml\n\n"
        f"with, in `recipe.toml`,\n\n```toml\n{recipe_of(config)}```\n" + (f"\n{text}" if text else "")
    )


def _parted(card: str) -> tuple[str, str]:
    """The facts for the Hub that a card may begin with, and the rest."""
    match = re.match(r"\ufeff?(---[ \t]*\r?\n.*?^---[ \t]*)(?:\r?\n|\Z)", card, re.DOTALL | re.MULTILINE)
    return ("", card) if match is None else (f"{match[1]}\n\n", card[match.end() :].lstrip("\r\n"))
