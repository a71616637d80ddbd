"""Rules with which transformers reads separate experts of families for which it has none."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import ConversionOps, WeightConverter
from typing_extensions import override

from cbqstream.models.experts import Experts, FusedPart
from cbqstream.models.meta_model import MetaModel

_PACKED = "_packed"
"""End of the names of quantized weights, which transformers dequantizes before the other operations of a rule."""


class _Fuse(ConversionOps):
    """Operation that fuses the weights or the biases of separate experts.

    Args:
        parts: place of each parameter in the fused tensor, by the pattern of its names.
    """

    def __init__(self, parts: Mapping[str, FusedPart]) -> None:
        self._parts = parts

    @override
    def convert(
        self, input_dict: Mapping[str, Any], source_patterns: Sequence[str], target_patterns: Sequence[str], **_: Any
    ) -> dict[str, Any]:
        """The fused tensor, by the first target pattern."""
        values: dict[int | None, Tensor] = {}
        for pattern, tensors in input_dict.items():
            part = self._parts[pattern.removesuffix(_PACKED)]
            values[part.half] = tensors if isinstance(tensors, Tensor) else torch.stack(tensors)
        return {target_patterns[0]: next(iter(self._parts.values())).fuse(values)}

    @property
    @override
    def reverse_op(self) -> ConversionOps:
        """Operation that separates the experts, which no one needs here."""
        raise NotImplementedError


def reads_separate_experts(meta_model: MetaModel) -> bool:
    """Whether transformers has rules that read separate experts of a model; True if the model has no experts."""
    rules = get_model_conversion_mapping(meta_model.hf_model)
    targets = [
        target
        for rule in rules
        if isinstance(rule, WeightConverter) and any("*" in pattern for pattern in rule.source_patterns)
        for target in rule.target_patterns
    ]
    names = {
        f"{owner}.{part.tensor}" for owner, experts in _experts(meta_model).items() for part in experts.fused.values()
    }
    return all(any(target in name for target in targets) for name in names)


def register_separate_experts(meta_model: MetaModel, class_name: str) -> None:
    """Give transformers rules that read separate experts, for a class of models and this process.

    Args:
        meta_model: a model of the class.
        class_name: name of the class.
    """
    rules: dict[str, dict[str, FusedPart]] = defaultdict(dict)
    for owner, experts in _experts(meta_model).items():
        for leaf, part in experts.fused.items():
            rules[f"{owner}.{part.tensor}"][f"{re.escape(owner)}\\.*.{leaf}"] = part
    made = [WeightConverter(list(parts), target, [_Fuse(parts)]) for target, parts in rules.items()]
    known: Any = get_checkpoint_conversion_mapping(class_name)  # type: ignore[no-untyped-call]
    register_checkpoint_conversion_mapping(class_name, [*(known or ()), *made], overwrite=True)


def _experts(meta_model: MetaModel) -> dict[str, Experts]:
    """Experts of the first block of each form, by their path in a block after the path of the model."""
    return {
        name: module
        for block in meta_model.templates
        for name, module in block.named_modules()
        if isinstance(module, Experts)
    }
