"""Tensors of a model: stored in a file as they are, or computed from stored tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from cbqstream.errors import InputError

_PIECE = re.compile(r"(?P<whole>.+)\[(?P<start>\d+)(:(?P<stop>\d+))?\]")
"""Matches the name of a piece of a tensor."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Location of a tensor in a checkpoint."""

    name: str
    stored_dtype: str
    """Name of the dtype in the header of the file, such as BF16."""
    torch_dtype: torch.dtype | None
    """The dtype in torch; None if tensors of this dtype are copied but not computed with."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Offset of the first byte in the file."""
    end: int
    """Offset of the byte after the last."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return self.end - self.start

    @property
    def stored(self) -> Iterator[TensorInfo]:
        """Stored tensors from which it is read, which is the tensor itself."""
        yield self

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the values are read.

        Raises:
            InputError: tensors of this dtype are copied but not computed with.
        """
        if self.torch_dtype is None:
            raise self._not_readable()
        return self.torch_dtype

    def require_readable(self) -> None:
        """Check that the values can be computed with.

        Raises:
            InputError: tensors of this dtype are only copied.
        """
        if self.torch_dtype is None:
            raise self._not_readable()

    def _not_readable(self) -> InputError:
        problem = f"has dtype {self.stored_dtype}, which is copied but not computed with"
        return InputError(self.file, f"{problem}. Convert it to bf16, fp16 or fp32.", tensor=self.name)


@dataclass(frozen=True, slots=True)
class DerivedTensor:
    """A tensor of a model that is computed from stored tensors: decoded from a quantized form, or in another layout."""

    name: str
    torch_dtype: torch.dtype
    """Dtype of the computed tensor."""
    shape: tuple[int, ...]
    """Shape of the computed tensor."""
    parts: Mapping[str, ModelTensor]
    """Tensors from which it is computed, by the names that `make` expects."""
    make: Callable[[Mapping[str, Tensor]], Tensor]
    """Computes the tensor from the values of the parts; raises ValueError with the reason if they have no valid meaning."""
    piecewise: bool = False
    """Whether `make` gives the values at index i of the first dimension if it gets those at index i of all parts."""
    in_other_layout: bool = False
    """Whether the parts hold the same values as dense tensors of the checkpoint, which are copied if the tensor itself is not needed."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computed tensor."""
        return self.torch_dtype

    @property
    def num_bytes(self) -> int:
        """Size of the computed tensor."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def file(self) -> Path:
        """File of the first part."""
        return next(iter(self.parts.values())).file

    @property
    def stored(self) -> Iterator[TensorInfo]:
        """The stored tensors, or the pieces of stored tensors, from which it is computed."""
        for part in self.parts.values():
            yield from part.stored

    def require_readable(self) -> None:
        """Return, because a derived tensor can always be computed with."""


ModelTensor: TypeAlias = "TensorInfo | DerivedTensor"
"""A tensor of a model: stored as it is, or computed from stored tensors."""


def piece(tensor: ModelTensor, index: int) -> ModelTensor:
    """The values at `index` of the first dimension of a tensor, such as those of one expert. Only they are read from the file.

    Raises:
        ValueError: the tensor is computed in a way that does not allow it.
    """
    name, shape = f"{tensor.name}[{index}]", tensor.shape[1:]
    if isinstance(tensor, DerivedTensor):
        if not tensor.piecewise:
            raise ValueError(f"{tensor.name} can only be computed as a whole")
        parts = {key: piece(part, index) for key, part in tensor.parts.items()}
        return replace(tensor, name=name, shape=shape, parts=parts, piecewise=False)
    size = tensor.num_bytes // tensor.shape[0]
    start = tensor.start + index * size
    return replace(tensor, name=name, shape=shape, start=start, end=start + size)


def rows_of(tensor: ModelTensor, rows: slice) -> ModelTensor:
    """Consecutive rows of a tensor, `rows.start` to `rows.stop - 1` of its first dimension."""
    name, shape = f"{tensor.name}[{rows.start}:{rows.stop}]", (rows.stop - rows.start, *tensor.shape[1:])
    if isinstance(tensor, DerivedTensor):
        return DerivedTensor(name, tensor.dtype, shape, {"whole": tensor}, lambda parts: parts["whole"][rows].clone())
    size = tensor.num_bytes // tensor.shape[0]
    return replace(
        tensor, name=name, shape=shape, start=tensor.start + rows.start * size, end=tensor.start + rows.stop * size
    )


def named_piece(stored: Mapping[str, TensorInfo], name: str) -> TensorInfo | None:
    """A stored tensor, or the piece of one that has a name from `piece` and `rows_of`; None if the tensor is not stored."""
    found = stored.get(name)
    match = _PIECE.fullmatch(name)
    if found is not None or match is None:
        return found
    whole = named_piece(stored, match["whole"])
    start, stop = int(match["start"]), match["stop"]
    if whole is None or not whole.shape or int(stop or start + 1) > whole.shape[0]:
        return None
    made = piece(whole, start) if stop is None else rows_of(whole, slice(start, int(stop)))
    return made if isinstance(made, TensorInfo) else None


def copied(tensors: Mapping[str, ModelTensor]) -> dict[str, ModelTensor]:
    """Tensors of a model that is not changed, by name: as the checkpoint has them, in place of those in another layout."""
    found: dict[str, ModelTensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DerivedTensor) and tensor.in_other_layout:
            found |= {part.name: part for part in tensor.parts.values()}
        else:
            found[name] = tensor
    return found


def stored_names(tensor: ModelTensor) -> frozenset[str]:
    """Names in the files of the stored tensors from which a tensor is read, as a whole or in part."""
    return frozenset(part.name.partition("[")[0] for part in tensor.stored)


def moved(tensor: ModelTensor, infos: Mapping[str, ModelTensor]) -> ModelTensor:
    """A tensor in another layout, read from the copies of its parts in another checkpoint.

    Args:
        tensor: the tensor, whose parts `copied` gave.
        infos: tensors of the other checkpoint, by name.

    Raises:
        KeyError: the other checkpoint does not have a part.
    """
    if not isinstance(tensor, DerivedTensor):
        return infos[tensor.name]
    return replace(tensor, parts={key: infos[part.name] for key, part in tensor.parts.items()})


def stored_bytes(tensors: Iterable[ModelTensor]) -> int:
    """Size in the files of the stored tensors from which tensors of a model are read. Tensors that share a stored one count it once."""
    pieces = {(part.file, part.start, part.end) for tensor in tensors for part in tensor.stored}
    return sum(end - start for _, start, end in pieces)


def computed_bytes(tensors: Iterable[ModelTensor]) -> int:
    """Size of tensors of a model in memory, in their own dtypes. A tensor that is named several times counts once."""
    return sum(tensor.num_bytes for tensor in {tensor.name: tensor for tensor in tensors}.values())


class WeightSource(Protocol):
    """Dense tensors of a model by name: of a checkpoint, or of a quantized one that is dequantized as it is read."""

    def read(self, name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on `device`, in `dtype` or as it is stored."""
        ...

    def input_quantizer(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """The function that the linear layer with weight `name` applies to its input first, or None."""
        ...


class OpenedSource(WeightSource, Protocol):
    """A checkpoint whose tensors are known."""

    @property
    def infos(self) -> Mapping[str, ModelTensor]:
        """Dense tensors, by name."""
        ...

    def viewed(self, infos: Mapping[str, ModelTensor]) -> OpenedSource:
        """Return the checkpoint with other tensors, which are derived from its own."""
        ...


class StoredTensors(OpenedSource, Protocol):
    """Tensors of a checkpoint that can also be copied as they are stored."""

    def value(self, tensor: ModelTensor) -> Tensor:
        """A tensor of the checkpoint or a part of one, on the CPU."""
        ...

    def raw(self, tensor: ModelTensor) -> Iterator[bytes]:
        """Bytes of one tensor in pieces: as they are stored, or of the computed tensor if it is derived."""
        ...
