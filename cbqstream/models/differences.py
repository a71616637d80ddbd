"""Comparison of what the code of a model computes, and the error for a model that cannot be run block by block."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cbqstream.errors import InputError, shown
from cbqstream.models.meta_model import MetaModel

_TOLERANCE = 1e-3
"""Allowed difference of hidden states that should be equal, as a share of the largest value."""
_DEPTH = 8
"""Depth to which arguments that are objects are compared."""


def near(one: Tensor, other: Tensor) -> bool:
    """Whether hidden states are equal up to differences of float32 arithmetic; values that are not finite are not compared."""
    return not bool((one - other).abs().max() > _TOLERANCE * other.abs().max())


def same(one: Any, other: Any, depth: int = _DEPTH) -> bool:
    """Whether two values are equal, with all tensors in them. Objects are compared by their attributes."""
    if one is other or depth == 0:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair, depth - 1) for pair in zip(one, other, strict=True))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key], depth - 1) for key in one)
    if hasattr(one, "__dict__"):
        return same(vars(one), vars(other), depth - 1)
    return bool(one == other)


def not_streamable(meta_model: MetaModel, what: str) -> InputError:
    """The error for a model that cannot be run block by block."""
    kind = shown(str(meta_model.config.model_type))
    return InputError(
        meta_model.folder / "config.json",
        f'architecture "{kind}" cannot be run block by block here: {what}. Use another model.',
    )


def name_of(meta_model: MetaModel, index: int) -> str:
    """Path and class of a block, for messages."""
    return f"{meta_model.blocks[index].prefix} ({type(meta_model.templates[index]).__name__})"
