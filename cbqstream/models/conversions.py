"""Conversions of tensors of a checkpoint into those of a model, by the rules of transformers."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter


@dataclass(frozen=True, slots=True)
class Conversion:
    """Tensors of a checkpoint that one rule of transformers converts together."""

    rule: WeightConverter
    target: str
    """Name in the model of the first tensor that is made."""
    sources: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Names in the checkpoint, in the order of their numbers, by the pattern of the rule that they match."""

    @property
    def names(self) -> list[str]:
        """Names in the checkpoint of all tensors."""
        return [name for names in self.sources.values() for name in names]

    @property
    def targets(self) -> list[str]:
        """Names in the model of the tensors that are made."""
        first = self.rule.target_patterns[0]
        return [self.target.replace(first, pattern, 1) for pattern in self.rule.target_patterns]

    def run(self, values: Mapping[str, Sequence[Tensor]], parameters: "Parameters", config: Any) -> dict[str, Tensor]:
        """The tensors that are made, by their name in the model.

        Args:
            values: tensors in the order of `sources`, by the same patterns.
            parameters: the parameters of the model.
            config: configuration of the model.
        """
        found: Any = {pattern: list(tensors) for pattern, tensors in values.items()}
        for operation in self.rule.operations:
            found = operation.convert(
                found,
                source_patterns=self.rule.source_patterns,
                target_patterns=self.rule.target_patterns,
                full_layer_name=self.target,
                model=parameters,
                config=config,
                missing_keys=None,
            )
        before, _, after = next((self.target.partition(key) for key in found if key in self.target), ("", "", ""))
        return {f"{before}{key}{after}": value[0] if isinstance(value, list) else value for key, value in found.items()}


class Parameters:
    """Parameters of the model as transformers has them, whose shape and dtype some conversions read.

    Args:
        values: parameters by name.
        of_one_expert: whether parameters of experts have the values of one expert.
    """

    def __init__(self, values: Mapping[str, Tensor], *, of_one_expert: bool = False) -> None:
        self._values, self._one = values, of_one_expert

    def get_parameter(self, name: str) -> Tensor:
        """The parameter `name`, without values."""
        value = self._values[name]
        shape = (1, *value.shape[1:]) if self._one else value.shape
        return torch.empty(shape, dtype=value.dtype, device="meta")
