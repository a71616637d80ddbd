"""A decoder of quantized weights, and checks of the tensors from which it makes a weight."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cbqstream.checkpoint.folder import quant_method_of
from cbqstream.checkpoint.tensors import DerivedTensor, TensorInfo
from cbqstream.errors import InputError

_FLOAT8 = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
REPAIR = "Download it again, or give the original model."
"""Remedy for tensors that do not fit together."""
_SLAB_WEIGHTS = 1 << 20
"""Largest number of weights that are decoded at once, because their temporary values are float32."""

Parts: TypeAlias = Mapping[str, TensorInfo]
"""The stored tensors of a weight, by the names of `Decoder.ends`."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """Description of a quantized model."""

    place: str
    """File in which the quantization_config stands, and the part of it, for messages."""
    config: Mapping[str, Any]
    """The quantization_config."""
    dtype: torch.dtype
    """Dtype of the decoded weights, which is that of the model."""


MakeWeight: TypeAlias = Callable[[str, Parts], DerivedTensor]
"""Makes the weight with a name from its parts; raises InputError if they do not fit together. Only headers are read."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """A way in which weights are stored."""

    codes: str
    """The part with the codes, which every quantized weight has."""
    ends: Mapping[str, tuple[str, str]]
    """For each end of the name of a stored part: the end of the name of the weight that replaces it, and the name of the part.

    The first end that fits counts.
    """
    open: Callable[[Quantized], MakeWeight]
    """Checks the quantization_config of a model and returns the function that makes its weights.

    It raises InputError if the quantization_config is not complete or describes a form that is not read.
    """
    in_place: Collection[str] = ()
    """Dtypes, by their name in the header, of codes that are stored under the name of the weight."""


def not_read(quantized: Quantized, what: str) -> InputError:
    """The error for a quantization_config that is not read; `what` is a part of a sentence."""
    method = quant_method_of(quantized.config)
    return InputError(
        quantized.place, f"the model is already quantized ({method}), and {what}. Give the original model."
    )


def require_part(name: str, parts: Parts, part: str, codes: str, end: str) -> TensorInfo:
    """A part of a weight.

    Args:
        name: name of the weight.
        parts: parts of the weight.
        part: name of the part.
        codes: the part with the codes, for the message.
        end: name of the stored part without that of the module, for the message.

    Raises:
        InputError: it is missing.
    """
    if part not in parts:
        raise InputError(parts[codes].file, f"its {end} is missing. {REPAIR}", tensor=name)
    return parts[part]


def require_form(info: TensorInfo, shapes: Collection[tuple[int, ...]], dtypes: Collection[str]) -> None:
    """Check shape and dtype of a stored part.

    Args:
        info: the part.
        shapes: shapes that are possible.
        dtypes: dtypes that are possible, by their name in the header.

    Raises:
        InputError: it has another shape or dtype.
    """
    if info.stored_dtype not in dtypes:
        needed = " or ".join(sorted(dtypes))
        raise InputError(
            info.file, f"has dtype {info.stored_dtype}, but must have {needed}. {REPAIR}", tensor=info.name
        )
    if info.shape not in shapes:
        needed = " or ".join(str(list(shape)) for shape in shapes)
        raise InputError(info.file, f"has shape {list(info.shape)}, but must have {needed}. {REPAIR}", tensor=info.name)


def float8(info: TensorInfo) -> TensorInfo:
    """A stored part that can be read although its dtype is one of FP8, which are only copied otherwise."""
    dtype = _FLOAT8.get(info.stored_dtype)
    return info if dtype is None else replace(info, torch_dtype=dtype)


def require_scales(scale: Tensor, *, zero: bool = False, negative: bool = False, what: str = "scale") -> None:
    """Check the values of scales.

    Args:
        scale: the scales, of a dtype with which torch computes.
        zero: accept scales of zero, which some programs write for a group of zeros, or where a scale is too small for its dtype.
        negative: accept negative scales.
        what: name of the scales, for the message.

    Raises:
        ValueError: a scale has another value.
    """
    low, high = (value.item() for value in torch.aminmax(scale))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"a {what} is not finite")
    if low < 0 and not negative:
        raise ValueError(f"a {what} is negative ({low:g})")
    if not zero and not torch.count_nonzero(scale) == scale.numel():
        raise ValueError(f"a {what} is zero")


def by_rows(shape: tuple[int, int], dtype: torch.dtype, step: int, rows_of: Callable[[slice], Tensor]) -> Tensor:
    """A matrix that is computed a few rows at a time, so that temporary values take little memory.

    Args:
        shape: shape of the matrix.
        dtype: dtype of the matrix.
        step: number of rows of which every slab but the last has a multiple.
        rows_of: computes a slab [rows, columns] in any floating dtype.
    """
    made = torch.empty(shape, dtype=dtype)
    for slab in _slabs(shape[0], shape[1], step):
        made[slab] = rows_of(slab)
    return made


def by_columns(shape: tuple[int, int], dtype: torch.dtype, step: int, columns_of: Callable[[slice], Tensor]) -> Tensor:
    """A matrix that is computed a few columns at a time, see `by_rows`; `columns_of` computes a slab [columns, rows]."""
    made = torch.empty(shape, dtype=dtype)
    for slab in _slabs(shape[1], shape[0], step):
        made[:, slab] = columns_of(slab).T
    return made


def _slabs(count: int, width: int, step: int) -> Iterator[slice]:
    """Slabs of `count` rows of `width` values. Every slab but the last has a multiple of `step` rows."""
    rows = step * max(1, _SLAB_WEIGHTS // (step * max(1, width)))
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))
