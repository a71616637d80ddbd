"""Names of tensors in checkpoints and in modules, related by the rules with which transformers reads checkpoints."""

import re
from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from cbqstream.models.families import ExpertLayout


def stored_names(model: Any, stored: Iterable[str], layout: ExpertLayout) -> dict[str, str]:
    """Name in the checkpoint of every tensor, by its name in a model whose experts are separate modules.

    Args:
        model: a model of transformers.
        stored: names in the checkpoint.
        layout: layout of the fused experts of the model in transformers.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    of_experts = [pair for rule in rules if isinstance(rule, WeightConverter) for pair in _expert_names(rule, layout)]
    names = {}
    for name in stored:
        renamed = name
        for rule in renamings:
            renamed, _ = rule.rename_source_key(renamed)
        for pattern, replacement in of_experts:
            renamed = pattern.sub(replacement, renamed)
        names[renamed] = name
    return names


def _expert_names(rule: WeightConverter, layout: ExpertLayout) -> list[tuple[re.Pattern[str], str]]:
    """Patterns that match the names in checkpoints of the layers that a rule fuses, and replacements that give the names in the model."""
    fused = rule.target_patterns[0].rpartition(".")[2] if len(rule.target_patterns) == 1 else ""
    if len(layout.fused.get(fused, ())) != len(rule.source_patterns):
        return []
    pairs = []
    for source, part in zip(rule.source_patterns, layout.fused[fused], strict=True):
        head, star, leaf = re.sub(r"\\(.)", r"\1", source).partition("*")
        if star:
            pairs.append(
                (re.compile(rf"({re.escape(head)}\d+\.){re.escape(leaf.removeprefix('.'))}$"), rf"\g<1>{part}.weight")
            )
    return pairs
