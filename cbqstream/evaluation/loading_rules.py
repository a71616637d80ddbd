"""Rules with which transformers reads results for which it has no rules of its own.

A result has a tensor for each expert, and tensors in full precision as the source has them. For some families, transformers has no rule
that fuses separate experts. Rules that convert tensors in full precision fail in a model of compressed-tensors, because transformers
dequantizes their sources first, which then are lost.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, conversion_mapping
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import ConversionOps, WeightConverter
from typing_extensions import override

from cbqstream.checkpoint.tensors import DerivedTensor
from cbqstream.models.experts import Experts, FusedPart, SortedExperts
from cbqstream.models.meta_model import MetaModel

_PACKED = "_packed"
"""End of the names of quantized weights, which transformers dequantizes before the other operations of a rule."""
_WEIGHT = ".weight"
_END = "$"
"""End of a pattern. Patterns that do not end with `.weight` are not changed for quantized models."""


class _Fuse(ConversionOps):
    """Operation that fuses the weights or the biases of separate experts.

    Args:
        parts: place of each parameter in the fused tensor, by the pattern of its names.
    """

    def __init__(self, parts: Mapping[str, FusedPart]) -> None:
        self._parts = parts

    @override
    def convert(
        self,
        input_dict: Mapping[str, Any],
        source_patterns: Sequence[str],
        target_patterns: Sequence[str],
        *,
        model: Any = None,
        full_layer_name: str = "",
        **_: Any,
    ) -> dict[str, Any]:
        """The fused tensor, by the first target pattern. Experts that the checkpoint does not have are zero."""
        values: dict[int | None, list[Tensor]] = {}
        for pattern, part in self._parts.items():
            found = input_dict.get(pattern, input_dict.get(f"{pattern}{_PACKED}", ()))
            values.setdefault(part.half, []).extend(found)
        fused = next(iter(self._parts.values())).fuse({half: torch.stack(found) for half, found in values.items()})
        missing = model.get_parameter(full_layer_name).shape[0] - len(fused)
        zeros = fused.new_zeros(max(0, missing), *fused.shape[1:])
        return {target_patterns[0]: torch.cat([fused, zeros]) if missing > 0 else fused}


def lacks_rules(meta_model: MetaModel) -> bool:
    """Whether transformers lacks rules to read a result for a model.

    Args:
        meta_model: the model, with the names of the result or of its source.
    """
    converted = (tensor for tensor in meta_model.infos.values() if isinstance(tensor, DerivedTensor))
    return bool(_rules_for_experts(meta_model)) or any(tensor.in_other_layout for tensor in converted)


@contextmanager
def given_rules(meta_model: MetaModel, class_name: str, *, alias: str | None, packed: bool) -> Iterator[None]:
    """Give transformers the rules that it may need to read a result, inside a `with`.

    Args:
        meta_model: the model, with the names of the result.
        class_name: name of the class that is loaded.
        alias: the `model_type` in config.json, if transformers has the architecture under another one, as for Kimi K2.
        packed: whether the model is a result of `quantize`.
    """
    _registered(class_name)  # builds the rules of transformers
    places: tuple[Any, ...] = (
        conversion_mapping._checkpoint_conversion_mapping_cache,
        conversion_mapping.USER_REGISTERED_MAPPINGS,
    )
    before = [copy.copy(place) for place in places]
    try:
        if packed:
            _give_rules(meta_model, class_name)
        if alias is not None:
            _register(alias, _registered(str(meta_model.config.model_type)))
        yield
    finally:
        for place, rules in zip(places, before, strict=True):
            place.clear()
            place.update(rules)


def _give_rules(meta_model: MetaModel, class_name: str) -> None:
    modules = [module for module in meta_model.hf_model.modules() if isinstance(module, PreTrainedModel)]
    places = {name for module in modules for name in (type(module).__name__, str(module.config.model_type))}
    for place in sorted(places):
        known = _registered(place)
        # transformers raises an exception if it changes a rule with several targets for a quantized model
        fine = [rule for rule in known if not (_is_dense(rule) and len(rule.target_patterns) > 1)]
        if len(fine) < len(known):
            _register(place, [*(_whole(rule) for rule in known if rule not in fine), *fine])
    dense = [_whole(rule) for rule in _known_rules(meta_model) if all(map(_is_weight, rule.source_patterns))]
    # one rule at most is applied to a tensor: the first one that matches
    rules = sorted([*dense, *_rules_for_experts(meta_model)], key=_breadth)
    # transformers does not look for the rules of a model type if the class has rules
    names = class_name, str(meta_model.config.model_type)
    place = next((name for name in names if _registered(name)), class_name)
    _register(place, [*rules, *_registered(place)])


def _registered(place: str) -> list[Any]:
    """Rules of transformers for a class or a model type."""
    return list(get_checkpoint_conversion_mapping(place) or ())  # type: ignore[no-untyped-call]


def _register(place: str, rules: list[Any]) -> None:
    if rules:
        register_checkpoint_conversion_mapping(place, rules, overwrite=True)


def _is_weight(pattern: str) -> bool:
    return pattern.endswith(_WEIGHT)


def _is_dense(rule: Any) -> bool:
    """Whether a rule converts weights that are not those of experts."""
    return isinstance(rule, WeightConverter) and all(
        _is_weight(text) and "*" not in text for text in rule.source_patterns
    )


def _whole(rule: WeightConverter) -> WeightConverter:
    """The rule for weights in full precision only, which transformers does not change for a quantized model."""
    patterns = [f"{pattern}{_END}" for pattern in rule.source_patterns]
    return rule.copy(patterns, rule.target_patterns, operations=rule.operations)


def _breadth(rule: WeightConverter) -> int:
    """Order of a rule: those for single experts first, then those for tensors in full precision, then those for all experts."""
    if all(pattern.endswith(_END) for pattern in rule.source_patterns):
        return int("*" in rule.source_patterns[0])
    return 2 if "*" in rule.source_patterns[0] else 0


def _known_rules(meta_model: MetaModel) -> list[WeightConverter]:
    return [rule for rule in get_model_conversion_mapping(meta_model.hf_model) if isinstance(rule, WeightConverter)]


def _rules_for_experts(meta_model: MetaModel) -> list[WeightConverter]:
    """Rules that fuse separate experts, without those that transformers has."""
    known = _known_rules(meta_model)
    return [
        WeightConverter(list(parts), target, [_Fuse(parts)])
        for target, (parts, identity) in _expert_rules(meta_model).items()
        if identity or not _has_rule(known, target, parts)
    ]


def _has_rule(known: Sequence[WeightConverter], target: str, parts: Mapping[str, FusedPart]) -> bool:
    """Whether transformers has a rule that fuses all experts of a fused tensor, and nothing else."""
    fusing = (rule for rule in known if len(rule.target_patterns) == 1 and "*" in rule.source_patterns[0])
    return all("*" in pattern for pattern in parts) and any(rule.target_patterns[0] in target for rule in fusing)


def _expert_rules(meta_model: MetaModel) -> dict[str, tuple[dict[str, FusedPart], bool]]:
    """Place of each parameter in a fused tensor of experts by the pattern of its names, and whether there are experts without weights.

    The keys are the paths of the fused tensors in a block.
    """
    rules: dict[str, tuple[dict[str, FusedPart], bool]] = {}
    for spec, block in zip(meta_model.blocks, meta_model.templates, strict=True):
        experts = ((name, module) for name, module in block.named_modules() if isinstance(module, Experts))
        for owner, module in experts:
            # transformers replaces these by separate modules when it loads a quantized model
            if isinstance(module, SortedExperts) or f"{owner}.{module.any_tensor}" in rules:
                continue
            quantized = any(name.startswith(f"{owner}.") for name in spec.linears)
            for leaf, part in module.fused.items():
                names = [spec.tensors[f"{owner}.{number}.{leaf}"] for number in range(len(module))]
                for pattern in _patterns(names, spec.index):
                    end = "" if quantized or not pattern.endswith(_WEIGHT) else _END
                    parts, _ = rules.setdefault(f"{owner}.{part.tensor}", ({}, module.identity))
                    parts[f"{pattern}{end}"] = part
    return rules


def _patterns(names: Sequence[str], index: int) -> Iterator[str]:
    """Patterns that match names of a parameter of the experts of block `index`, in their order: one for all, or one for each."""
    tails = [name.partition(f".{index}.")[2] for name in names]
    head, _, leaf = tails[0].partition(".0.")
    if all(tail == f"{head}.{number}.{leaf}" for number, tail in enumerate(tails)):
        yield f"{re.escape(head)}\\.*.{leaf}"
    else:
        yield from (
            re.escape(tail).removesuffix(r"\.weight") + _WEIGHT if tail.endswith(_WEIGHT) else tail for tail in tails
        )
