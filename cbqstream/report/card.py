"""Files that describe a finished model: the model card, and metrics.jsonl. They do not depend on the speed of the machine."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from cbqstream.options import recipe_of
from cbqstream.records import EpochReport, WindowReport
from cbqstream.report.facts import grid_in_words
from cbqstream.rundir.chain import Chain

CARD, METRICS = "README.md", "metrics.jsonl"


def metrics_lines(reports: Sequence[WindowReport | EpochReport]) -> str:
    """Content of metrics.jsonl: one line of JSON with the result of each window and epoch, without its time and memory."""
    without_costs = [replace(report, costs=None).to_dict() for report in reports]
    return "".join(json.dumps(values, sort_keys=True) + "\n" for values in without_costs)


def model_card(chain: Chain, original: str, share: float) -> str:
    """The model card of a finished run: a table of facts, the settings as a recipe, and the card of the source.

    Args:
        chain: the run.
        original: README.md of the source; an empty string if there is none. Its metadata for the Hub, such as the license, stays at the
            start of the card.
        share: share of the weights of all blocks that is quantized, from 0 to 1.
    """
    run, windows, epochs = chain.run, chain.window_reports, chain.epoch_reports
    config, (segments, tokens, _) = run.config, run.stream
    metadata, text = _split_card(original)
    scheme, numerics = config.scheme, run.identity.numerics
    inputs = (
        f"{scheme.activation_bits} bits, per {scheme.activation_strategy}"
        if scheme.activation_bits
        else "not quantized"
    )
    before = sum(report.loss_before for report in windows) / len(windows)
    after = sum(report.loss_after for report in windows) / len(windows)
    changed = sum(report.changed for report in windows) / len(windows)
    blocks = f"blocks {windows[0].start} to {windows[-1].stop - 1}, {share:.1%} of the weights of all blocks"
    rows = {
        "weights": f"{scheme.num_bits} bits, {grid_in_words(scheme)}",
        "inputs": inputs,
        "quantized": f"{blocks}{'; the head' if config.quantize_lm_head else ''}",
        "calibration": f"{segments} x {tokens} tokens, SHA-256 {run.identity.tokens}",
        "weights of the source": f"fingerprint {run.identity.source_weights}",
        "loss on held-out segments": f"{before:.4g} before training, {after:.4g} after (mean of {len(windows)} windows)",
        "codes changed from nearest": f"{changed:.2%}",
    }
    if epochs:
        rows["divergence, end to end"] = f"{epochs[0].loss_before:.4g} before, {epochs[-1].loss_after:.4g} after"
    rows["made with"] = f"cbqstream {run.version}, torch {numerics.torch}, transformers {numerics.transformers}"
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return (
        f"{metadata}# Quantized to {scheme.name}\n\n"
        "Quantized with cbqstream, by Cross-Block Quantization (arXiv 2312.07950).\n\n"
        f"| | |\n|---|---|\n{table}\n"
        "`metrics.jsonl` has the results of every window and layer. To reproduce this model:\n\n"
        "    cbqstream quantize MODEL OUT --dataset DATASET --recipe recipe.toml\n\n"
        f"with, in `recipe.toml`,\n\n```toml\n{recipe_of(config)}```\n" + (f"\n{text}" if text else "")
    )


def _split_card(card: str) -> tuple[str, str]:
    """Metadata for the Hub at the start of a card, and the rest."""
    match = re.match(r"\ufeff?(---[ \t]*\r?\n.*?^---[ \t]*)(?:\r?\n|\Z)", card, re.DOTALL | re.MULTILINE)
    return ("", card) if match is None else (f"{match[1]}\n\n", card[match.end() :].lstrip("\r\n"))
