"""Names of tensors in checkpoints against names in modules, by the rules with which transformers itself reads them."""

import re
from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""What `experts.py` makes of the two fused tensors of experts."""


def stored_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Name in the checkpoint of every tensor in `stored`, by its name in a model whose experts are separate."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    of_experts = [pair for rule in rules if isinstance(rule, WeightConverter) for pair in _expert_names(rule)]
    names = {}
    for name in stored:
        renamed = name
        for rule in renamings:
            renamed, _ = rule.rename_source_key(renamed)
        for pattern, replacement in of_experts:
            renamed = pattern.sub(replacement, renamed)
        names[renamed] = name
    return names


def _expert_names(rule: WeightConverter) -> list[tuple[re.Pattern[str], str]]:
    """How the layers of experts that this rule would fuse are called in checkpoints, and how here."""
    fused = rule.target_patterns[0].rpartition(".")[2] if len(rule.target_patterns) == 1 else ""
    if len(_PARTS.get(fused, ())) != len(rule.source_patterns):
        return []
    pairs = []
    for source, part in zip(rule.source_patterns, _PARTS[fused], strict=True):
        head, star, leaf = re.sub(r"\\(.)", r"\1", source).partition("*")
        if star:
            pairs.append(
                (re.compile(rf"({re.escape(head)}\d+\.){re.escape(leaf.removeprefix('.'))}$"), rf"\g<1>{part}.weight")
            )
    return pairs
