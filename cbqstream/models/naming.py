"""Tensors of a model, found in a checkpoint by the rules with which transformers reads checkpoints.

transformers renames tensors, and converts some: it stacks experts, concatenates or splits matrices, or transposes them. The conversions are
run here for one tensor at a time, when it is read. The weight of an expert is read from its place in a fused tensor, or from a tensor of
its own, whichever the checkpoint has.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

from cbqstream.checkpoint.tensors import DerivedTensor, ModelTensor, piece, rows_of
from cbqstream.errors import InputError, shown
from cbqstream.models.conversions import Conversion, Parameters
from cbqstream.models.experts import Experts, FusedPart

_OF_BLOCK = re.compile(r".*?\.\d+\.")
"""Matches the path of the block in the name of a tensor of a block."""
_OF_EXPERT = re.compile(r"(?P<owner>.+)\.(?P<number>\d+)\.(?P<leaf>\w+\.(weight|bias))")
"""Matches the name of a parameter of an expert."""
_MARKER = (2, 2)
"""Shape of the tensors that stand for the weights of experts, to find out where a conversion puts them."""


class StoredNames:
    """Tensors of a checkpoint, by their name in a model whose experts are separate modules.

    Args:
        folder: folder of the model, for messages.
        model: a model of transformers, with separate experts.
        whole: parameters and buffers of the model before the experts were separated, by name.
        infos: tensors of the checkpoint, by name.
    """

    def __init__(self, folder: Path, model: Any, whole: Mapping[str, Tensor], infos: Mapping[str, ModelTensor]) -> None:
        self._folder = folder
        self._infos = infos
        self._whole = whole
        self._config = model.config
        self._class_name = type(model).__name__
        self._base = f"{model.base_model_prefix}."
        self._tied: Mapping[str, str] = model.all_tied_weights_keys
        self._known = frozenset(model.state_dict())
        self._experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
        self._rules = get_model_conversion_mapping(model)
        self._stored: dict[str, str] = {}
        self._conversions: dict[str, Conversion] = {}
        self._place(infos)
        self._by_target = {target: each for each in self._conversions.values() for target in each.targets}
        self._apart = self._experts_apart()
        self._prefixes: dict[str, str] = {}
        self._made: dict[str, ModelTensor] = {}
        self._replaced: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        """Names in the model of all tensors of the checkpoint; tensors that the model does not have keep their names."""
        return iter([*self._stored, *self._conversions])

    def find(self, name: str) -> str | None:
        """Name in the checkpoint of the tensor with a name in the model; None if the checkpoint does not hold it as a tensor of its own.

        Some checkpoints omit the prefix of the base model. A tied tensor may be stored under any of its names. As in transformers, its own
        name goes first, so a head that is stored beside the embeddings is used although config.json ties the two.
        """
        source = self._tied.get(name, name)
        twins = [source, *(target for target, other in self._tied.items() if other == source)]
        found = (
            self._stored.get(key) or self._stored.get(key.removeprefix(self._base)) or self._apart.get(key)
            for key in (name, *twins)
        )
        return next((stored for stored in found if stored is not None), None)

    def require(self, name: str, shape: tuple[int, ...]) -> str:
        """Name in `view` of the tensor with a name and a shape in the model.

        Raises:
            InputError: the tensor is missing, is stored in a form that is not supported, or has another shape.
        """
        key = self.find(name)
        if key is None:
            key = self._name_in_view(name)
            self._made[key] = self._converted(name)
        found = self._made.get(key, self._infos.get(key))
        if found is not None and found.shape != shape:
            problem = f"has shape {list(found.shape)}, but config.json requires {list(shape)}."
            raise InputError(self._folder, problem, tensor=key)
        return key

    def view(self) -> dict[str, ModelTensor]:
        """Tensors of the checkpoint by name, in the layout of the model if the model has them in another one."""
        kept = {name: tensor for name, tensor in self._infos.items() if name not in self._replaced}
        return kept | self._made

    def _is_known(self, name: str) -> bool:
        """Whether the model has a tensor with a name, with or without the prefix of the base model."""
        return not self._known.isdisjoint((name, f"{self._base}{name}"))

    def _in_model(self, name: str) -> str:
        """Name in the model of a tensor whose name may lack the prefix of the base model."""
        with_prefix = f"{self._base}{name}"
        return with_prefix if name not in self._whole and with_prefix in self._whole else name

    def _is_of_expert(self, name: str) -> bool:
        """Whether a name is that of a parameter of an expert, even if the model has fewer experts."""
        match = _OF_EXPERT.fullmatch(name)
        experts = self._experts.get(match["owner"]) if match is not None else None
        return match is not None and experts is not None and match["leaf"] in experts.fused

    def _place(self, names: Iterable[str]) -> None:
        """Sort the tensors of the checkpoint into those that are only renamed, and those that are converted.

        A name that the model has already is not changed.
        """
        renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        for name in sorted(names, key=dot_natural_key) if converters else names:
            renamed = name
            if name not in self._known:
                for renaming in renamings:
                    renamed, _ = renaming.rename_source_key(renamed)
            fits = self._is_known(renamed) or self._is_of_expert(renamed)
            for rule in () if fits else converters:
                found, pattern = rule.rename_source_key(renamed)
                if pattern is not None:
                    target = self._in_model(found)
                    self._conversions.setdefault(target, Conversion(rule, target)).sources[pattern].append(name)
                    break
            else:
                self._stored[renamed] = name

    def _experts_apart(self) -> dict[str, str]:
        """Names in the checkpoint of the weights of experts that are tensors of their own, by their name in the model."""
        apart: dict[str, str] = {}
        for owner, experts in self._experts.items():
            for tensor in {part.tensor for part in experts.fused.values()}:
                conversion = self._by_target.get(f"{owner}.{tensor}")
                if conversion is None or any(len(self._infos[name].shape) != 2 for name in conversion.names):
                    continue
                names = conversion.names
                markers = self._marked(conversion).get(f"{owner}.{tensor}", torch.empty(0))
                leaves = {leaf: part for leaf, part in experts.fused.items() if part.tensor == tensor}
                for (number, values), (leaf, part) in product(enumerate(markers[: len(experts)]), leaves.items()):
                    marks = torch.unique(part.take(values))
                    if len(marks) == 1:
                        apart[f"{owner}.{number}.{leaf}"] = names[int(marks)]
        return apart

    def _marked(self, conversion: Conversion) -> dict[str, Tensor]:
        """The result of a conversion for matrices that are filled with their number.

        Raises:
            InputError: the experts are not numbered from 0 without gaps.
        """
        values, count = {}, 0
        for pattern, names in conversion.sources.items():
            for number, name in enumerate(names):
                if f".{number}." not in name:
                    problem = f"expert {number} is missing beside it. Download the model again."
                    raise InputError(self._folder, problem, tensor=name)
            values[pattern] = [torch.full(_MARKER, float(count + number)) for number in range(len(names))]
            count += len(names)
        return self._run(conversion, values, Parameters(self._whole))

    def _run(
        self, conversion: Conversion, values: Mapping[str, Sequence[Tensor]], parameters: Parameters
    ) -> dict[str, Tensor]:
        """The tensors that a conversion makes.

        Raises:
            InputError: the tensors of the checkpoint do not fit the conversion.
        """
        try:
            return conversion.run(values, parameters, self._config)
        except (ValueError, RuntimeError, IndexError, KeyError, AttributeError, TypeError) as error:
            reason = shown(str(error).partition("\n")[0])
            made = f"{self._class_name} of transformers cannot make {conversion.target} from it ({reason})"
            raise InputError(self._folder, f"{made}. Download the model again.", tensor=conversion.names[0]) from error

    def _converted(self, name: str) -> ModelTensor:
        """The tensor with a name in the model, made from tensors of the checkpoint that hold it in another layout.

        Raises:
            InputError: the checkpoint does not have it, or the tensors do not fit.
        """
        match = _OF_EXPERT.fullmatch(name)
        if match is not None and self._is_of_expert(name):
            part = self._experts[match["owner"]].fused[match["leaf"]]
            try:
                values = self._of_expert(f"{match['owner']}.{part.tensor}", int(match["number"]), name)
            except (ValueError, IndexError) as error:
                raise InputError(self._folder, f"{error}. Use another model.", tensor=name) from error
            return _part_of_expert(name, values, part)
        conversion = self._by_target.get(name)
        if conversion is None:
            raise InputError(self._folder, self._why_missing(name), tensor=name)
        self._replaced.update(conversion.names)
        tensors = {pattern: [self._infos[key] for key in keys] for pattern, keys in conversion.sources.items()}
        return self._derived(name, name, conversion, tensors, Parameters(self._whole))

    def _of_expert(self, fused: str, number: int, name: str) -> ModelTensor:
        """The values of one expert in a fused tensor of the model.

        Args:
            fused: name of the fused tensor in the model.
            number: number of the expert.
            name: name of the parameter of the expert, for messages.

        Raises:
            InputError: the checkpoint does not have the fused tensor.
            ValueError: the tensor cannot be read for one expert alone.
        """
        stored, conversion = self.find(fused), self._by_target.get(fused)
        if stored is not None:
            self._replaced.add(stored)
            self._require_experts(stored, fused)
            return piece(self._infos[stored], number)
        if conversion is None:
            raise InputError(self._folder, self._why_missing(name), tensor=name)
        self._replaced.update(conversion.names)
        for key in conversion.names:
            self._require_experts(key, fused)
        tensors = {
            pattern: [piece(self._infos[key], number) for key in keys] for pattern, keys in conversion.sources.items()
        }
        parameters = Parameters(self._whole, of_one_expert=True)
        return self._derived(f"{fused}[{number}]", fused, conversion, tensors, parameters, of_one_expert=True)

    def _require_experts(self, stored: str, fused: str) -> None:
        """Check that a tensor of the checkpoint has as many experts as the model.

        Raises:
            InputError: it has not.
        """
        found, needed = self._infos[stored].shape, self._whole[fused].shape
        if len(found) < 2 or found[0] != needed[0]:
            problem = f"has shape {list(found)}, but config.json requires {needed[0]} experts."
            raise InputError(self._folder, problem, tensor=stored)

    def _derived(
        self,
        name: str,
        target: str,
        conversion: Conversion,
        tensors: Mapping[str, Sequence[ModelTensor]],
        parameters: Parameters,
        *,
        of_one_expert: bool = False,
    ) -> DerivedTensor:
        """The tensor `target` that a conversion makes from tensors of the checkpoint."""

        def make(parts: Mapping[str, Tensor]) -> Tensor:
            values = {
                pattern: [
                    parts[f"{pattern} {position}"].unsqueeze(0) if of_one_expert else parts[f"{pattern} {position}"]
                    for position in range(len(found))
                ]
                for pattern, found in tensors.items()
            }
            made = self._run(conversion, values, parameters)[target]
            return made.squeeze(0) if of_one_expert else made

        parts = {
            f"{pattern} {position}": tensor
            for pattern, found in tensors.items()
            for position, tensor in enumerate(found)
        }
        empty = make({key: _empty(tensor) for key, tensor in parts.items()})
        return DerivedTensor(name, empty.dtype, tuple(empty.shape), parts, make, in_other_layout=not of_one_expert)

    def _name_in_view(self, name: str) -> str:
        """Name of a tensor that the checkpoint does not have under a name of its own: the one in the model, under the path of the block."""
        match = _OF_BLOCK.match(name)
        if match is None:
            return name
        block = match[0]
        if block not in self._prefixes:
            beside = (
                stored.removesuffix(key.removeprefix(block))
                for key, stored in self._stored.items()
                if key.startswith(block) and stored.endswith(f".{key.removeprefix(block)}")
            )
            self._prefixes[block] = next(beside, block)
        return self._prefixes[block] + name.removeprefix(block)

    def _why_missing(self, name: str) -> str:
        """The reason why the checkpoint does not have a tensor, and the remedy."""
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
        known = {*self._known, *self._whole}
        unknown = {key: stored for key, stored in self._stored.items() if key not in known}
        beside = [
            stored
            for key, stored in unknown.items()
            if (key.startswith(block[0]) if block is not None else _OF_BLOCK.match(key) is None)
        ]
        end = ".".join(name.rsplit(".", 4)[1:])
        alike = [stored for key, stored in unknown.items() if end in key and key.endswith(end)]
        return next(iter([*beside, *alike]), None)


def _empty(tensor: ModelTensor) -> Tensor:
    """A tensor without values, with the shape and dtype of a tensor of the checkpoint."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _part_of_expert(name: str, values: ModelTensor, part: FusedPart) -> ModelTensor:
    """A parameter of an expert, from its values in a fused tensor.

    Args:
        name: name of the parameter in the model.
        values: values of the expert in the fused tensor.
        part: place of the parameter in them.
    """
    if part.is_rows:
        if part.half is None:
            return values
        size = values.shape[0] // 2
        return rows_of(values, slice(part.half * size, (part.half + 1) * size))
    empty = part.take(_empty(values))
    return DerivedTensor(name, empty.dtype, tuple(empty.shape), {"fused": values}, partial(_taken, part))


def _taken(part: FusedPart, parts: Mapping[str, Tensor]) -> Tensor:
    return part.take(parts["fused"])
