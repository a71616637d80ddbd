"""Names of tensors in checkpoints and in modules, related by the rules with which transformers reads checkpoints."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from cbqstream.errors import InputError, shown
from cbqstream.models.families import ExpertLayout

_OF_EXPERT = re.compile(r"(.*\.)\d+\.\w+\.weight")
"""Matches the name of a weight of an expert, and the path of the module that contains the experts in it."""
_OF_BLOCK = re.compile(r".*?\.\d+\.")
"""Matches the path of the block in the name of a tensor of a block."""


class StoredNames:
    """Names in a checkpoint of the tensors of a model whose experts are separate modules.

    Args:
        folder: folder of the model, for messages.
        model: a model of transformers.
        tensors: shape of every tensor of the checkpoint, by name.
        layout: layout of the fused experts of the model in transformers.
    """

    def __init__(self, folder: Path, model: Any, tensors: Mapping[str, tuple[int, ...]], layout: ExpertLayout) -> None:
        self._folder = folder
        self._tensors = tensors
        self._layout = layout
        self._class_name = type(model).__name__
        self._base = f"{model.base_model_prefix}."
        self._tied: Mapping[str, str] = model.all_tied_weights_keys
        self._known = frozenset(model.state_dict())
        self._rules = get_model_conversion_mapping(model)
        self._stored = {converted: name for name, converted in self._converted(tensors)}

    def __iter__(self) -> Iterator[str]:
        """Names in the model of all tensors of the checkpoint; tensors that the model does not have keep their names."""
        return iter(self._stored)

    def find(self, name: str) -> str | None:
        """Name in the checkpoint of the tensor with a name in the model; None if the checkpoint does not have it.

        Some checkpoints omit the prefix of the base model. A tied tensor may be stored under any of its names. As in transformers, its own
        name goes first, so a head that is stored beside the embeddings is used although config.json ties the two.
        """
        source = self._tied.get(name, name)
        twins = [source, *(target for target, other in self._tied.items() if other == source)]
        found = (self._stored.get(key) or self._stored.get(key.removeprefix(self._base)) for key in (name, *twins))
        return next((stored for stored in found if stored is not None), None)

    def require(self, name: str, shape: tuple[int, ...]) -> str:
        """Name in the checkpoint of the tensor with a name and a shape in the model.

        Raises:
            InputError: the tensor is missing, is stored in a form that is not supported, or has another shape.
        """
        stored = self.find(name)
        if stored is None:
            raise InputError(self._folder, self._why_missing(name), tensor=name)
        if self._tensors[stored] != shape:
            found, needed = list(self._tensors[stored]), list(shape)
            raise InputError(self._folder, f"has shape {found}, but config.json requires {needed}.", tensor=stored)
        return stored

    def _why_missing(self, name: str) -> str:
        """The reason why the checkpoint does not have a tensor, and the remedy."""
        match = _OF_EXPERT.fullmatch(name)
        fused = [f"{match[1]}{part}" for part in self._layout.fused] if match is not None else []
        held = next((shown(self._stored[other]) for other in fused if other in self._stored), None)
        if held is not None:
            return f'the experts are stored fused (in "{held}"), which is not supported. Use a checkpoint with a tensor for each expert.'
        for rule in self._rules:
            if isinstance(rule, WeightConverter) and any(target in name for target in rule.target_patterns):
                made = " and ".join('"' + source.replace("\\", "") + '"' for source in rule.source_patterns)
                return f"{self._class_name} makes it from {made} as it reads a checkpoint, which is not supported. Use another model."
        other = self._unknown_instead_of(name)
        if other is not None:
            return (
                f'missing from the weights. They have "{shown(other)}" instead, which {self._class_name} of transformers does not have.'
                " Use a checkpoint with the names of transformers."
            )
        return "missing from the weights. Download the model again."

    def _unknown_instead_of(self, name: str) -> str | None:
        """A tensor of the checkpoint that the model does not have and that may be stored instead of a missing one.

        It is a tensor of the same block, or for a tensor outside the blocks a tensor outside the blocks; or a tensor whose name ends
        like that of the missing one.
        """
        block = _OF_BLOCK.match(name)
        unknown = {key: stored for key, stored in self._stored.items() if key not in self._known}
        beside = [
            stored
            for key, stored in unknown.items()
            if (key.startswith(block[0]) if block is not None else _OF_BLOCK.match(key) is None)
        ]
        end = ".".join(name.rsplit(".", 4)[1:])
        alike = [stored for key, stored in unknown.items() if end in key and key.endswith(end)]
        return next(iter([*beside, *alike]), None)

    def _converted(self, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Pairs of a name in the checkpoint and the name in the model. A name that the model already has is not changed."""
        renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        of_experts = [pair for rule in converters for pair in _expert_names(rule, self._layout)]
        for name in names:
            renamed = name
            if name not in self._known:
                for rule in renamings:
                    renamed, _ = rule.rename_source_key(renamed)
                for pattern, replacement in of_experts:
                    renamed = pattern.sub(replacement, renamed)
            yield name, renamed


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
