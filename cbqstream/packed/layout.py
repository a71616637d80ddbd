"""Layout of a quantized linear layer in a format of compressed-tensors: names, dtypes and shapes of its tensors, encoding and decoding.

A linear layer `NAME` has a weight [O, I] and G groups in a row; G is 1 for one scale per channel. All layouts have

    NAME.weight_scale       dtype of the original weight [O, G]
    NAME.weight_zero_point  see the layout                               if asymmetric
    NAME.input_scale        dtype of the original weight [1]             if inputs have one step size
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.tensors import TensorInfo
from cbqstream.records import QuantizedWeight
from cbqstream.scheme import Scheme

SCALE, ZERO_POINT, INPUT_SCALE = "weight_scale", "weight_zero_point", "input_scale"
COPY_AGAIN = "Download or copy the model again."
"""Remedy for a damaged layer."""


class Part(NamedTuple):
    """A stored tensor of a layer."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    """None if several dtypes are possible."""


class Layout(ABC):
    """Layout of a quantized linear layer. Tensors are named by the last part of their name."""

    __slots__ = ()

    format: ClassVar[str]
    """Name of the format in compressed-tensors."""
    codes: ClassVar[str]
    """The tensor with the codes, which every layer has."""
    others: ClassVar[tuple[str, ...]] = (SCALE,)
    """The other tensors that every layer has."""

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors that a layer may have."""
        return (self.codes, *self.others, ZERO_POINT, INPUT_SCALE)

    def needed(self, scheme: Scheme) -> tuple[str, ...]:
        """The tensors from which a weight is decoded."""
        return (self.codes, *self.others) if scheme.symmetric else (self.codes, *self.others, ZERO_POINT)

    @abstractmethod
    def is_for(self, scheme: Scheme) -> bool:
        """Whether new weights with a scheme are stored in this layout, unless an earlier row of `LAYOUTS` takes them."""

    @abstractmethod
    def can_hold(self, scheme: Scheme) -> bool:
        """Whether stored weights can have a scheme."""

    def warning(self, scheme: Scheme) -> str | None:
        """A sentence about engines that do not load a weight with a scheme in this layout, or None."""
        return None

    @abstractmethod
    def is_in(self, infos: Mapping[str, TensorInfo], layer: str) -> bool:
        """Whether a checkpoint has a layer in this layout, complete or not.

        Args:
            infos: location, shape and dtype of every tensor of the checkpoint, by name.
            layer: path of the layer in the checkpoint.
        """

    @abstractmethod
    def weight_shape(self, checkpoint: Checkpoint, layer: str) -> tuple[int, int]:
        """[O, I] of the weight of a layer.

        Raises:
            ValueError: the stored tensors do not say it; the message has no full stop.
        """

    @abstractmethod
    def parts(self, scheme: Scheme, rows: int, columns: int) -> dict[str, Part]:
        """Shape and dtype of the stored tensors of a weight [rows, columns]."""

    @abstractmethod
    def encode(self, weight: QuantizedWeight, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """Encode a weight.

        Args:
            weight: the quantized weight, on any device.
            scale_dtype: dtype in which scales and the step size of the inputs are stored.

        Returns:
            The stored tensors, on the CPU.
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """Decode a weight: the inverse of `encode`, except that the step size of the inputs is not restored.

        Args:
            tensors: stored tensors, at least those that are `needed`, on one device.
            scheme: scheme of the weight.
        """

    def faults(self, checkpoint: Checkpoint, layer: str, scheme: Scheme) -> Iterator[str]:
        """Problems of the tensors of a layer, one sentence each without its full stop: missing ones, wrong shapes or dtypes.

        Args:
            checkpoint: the checkpoint. Only its headers and the tensors `weight_shape` are read.
            layer: path of the layer in the checkpoint.
            scheme: scheme of the layer.
        """
        infos = checkpoint.stored
        missing = sorted(part for part in self.needed(scheme) if f"{layer}.{part}" not in infos)
        if missing:
            yield f"{', '.join(missing)} missing"
            return
        try:
            rows, columns = self.weight_shape(checkpoint, layer)
        except ValueError as error:
            yield str(error)
            return
        for name, part in self.parts(scheme, rows, columns).items():
            found = infos[f"{layer}.{name}"]
            if found.shape != part.shape:
                width = f"{scheme.num_bits} bits of {[rows, columns]} need {list(part.shape)}"
                yield f"{name} has shape {list(found.shape)}, but {width}"
            elif part.dtype not in (None, found.torch_dtype):
                yield f"{name} has dtype {found.torch_dtype or found.stored_dtype}, but {self.format} needs {part.dtype}"


def groups_of(scheme: Scheme, columns: int) -> int:
    """Number of groups in a row of `columns` columns."""
    return 1 if scheme.group_size is None else columns // scheme.group_size


def scales_of(weight: QuantizedWeight, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """Scales of a weight, and the step size of its inputs if it has one, as all layouts store them."""
    tensors = {SCALE: weight.scale.cpu().to(scale_dtype)}
    if weight.input_scale is not None:
        tensors[INPUT_SCALE] = weight.input_scale.cpu().to(scale_dtype)
    return tensors
