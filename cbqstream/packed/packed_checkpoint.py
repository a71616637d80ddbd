"""A quantized checkpoint that is read as if it were dense."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.checkpoint.tensors import DerivedTensor, ModelTensor
from cbqstream.errors import InputError
from cbqstream.numerics.activation_quant import quantize_per_tensor, quantize_per_token
from cbqstream.numerics.affine import dequantize
from cbqstream.packed.layout import COPY_AGAIN, INPUT_SCALE, SCALE, Layout
from cbqstream.packed.layouts import layouts_in
from cbqstream.records import QuantizedWeight
from cbqstream.scheme import LayerSchemes, Scheme

CPU = torch.device("cpu")


def _dequantize(layout: Layout, scheme: Scheme, parts: Mapping[str, Tensor]) -> Tensor:
    return dequantize(layout.decode(parts, scheme))


class PackedCheckpoint:
    """A checkpoint of compressed-tensors whose weights are dequantized one at a time when they are read.

    Args:
        checkpoint: the stored tensors.
        schemes: schemes of the quantized layers.

    Raises:
        InputError: the shape of a layer is not stored.
    """

    def __init__(self, checkpoint: Checkpoint, schemes: LayerSchemes) -> None:
        self.checkpoint = checkpoint
        self.schemes = schemes
        self._layouts = layouts_in(checkpoint.stored, schemes)
        self.layers = {layer: self._weight_shape(layer) for layer in self._layouts}
        """[O, I] of every quantized layer, by its path in the checkpoint."""
        parts = {f"{layer}.{part}" for layer, layout in self._layouts.items() for part in layout.names}
        self.others = {name: info for name, info in checkpoint.stored.items() if name not in parts}
        """Tensors that do not belong to a quantized layer, by name."""
        self._dense = Checkpoint({**self._dequantized(), **self.others}, checkpoint.stored)

    @property
    def infos(self) -> Mapping[str, ModelTensor]:
        """Dense tensors, by name."""
        return self._dense.infos

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every dense tensor, by name."""
        return self._dense.tensors()

    def viewed(self, infos: Mapping[str, ModelTensor]) -> "PackedCheckpoint":
        """Return the checkpoint with other dense tensors, which are derived from its own."""
        other = copy.copy(self)  # without reading the shapes of all layers again
        other._dense = self._dense.viewed(infos)
        return other

    def read(self, name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """One dense tensor on `device`.

        Args:
            name: name of the tensor in the original checkpoint.
            device: device of the result.
            dtype: dtype of the result. None is float32 for a quantized weight, which is then exact, and the stored dtype for others.

        Raises:
            InputError: a part of a quantized layer is missing, or has another shape or dtype.
        """
        if name.removesuffix(".weight") not in self.layers:
            return self._dense.read(name, device=device, dtype=dtype)
        weight = self.packed(name.removesuffix(".weight"), device)
        return dequantize(weight, torch.empty(weight.codes.shape, device=device, dtype=dtype or torch.float32))

    def packed(self, layer: str, device: torch.device = CPU) -> QuantizedWeight:
        """Codes, scales and zero points of a quantized layer.

        Args:
            layer: path of the layer in the checkpoint.
            device: device of the result.

        Raises:
            InputError: a part of the layer is missing, or has another shape or dtype.
        """
        layout, scheme = self._layouts[layer], self.schemes.of(layer)
        for fault in layout.faults(self.checkpoint, layer, scheme):
            raise self._damaged(layer, fault)
        return layout.decode({part: self._part(layer, part, device) for part in layout.needed(scheme)}, scheme)

    def file(self, layer: str) -> Path:
        """File of the codes of a quantized layer."""
        return self.checkpoint.stored[f"{layer}.{self._layouts[layer].codes}"].file

    def scale_dtype(self, layer: str) -> torch.dtype:
        """Dtype in which the scales of a quantized layer are stored, which is the dtype of the original weight."""
        return self.checkpoint.stored[f"{layer}.{SCALE}"].dtype

    def layer_scheme(self, layer: str) -> Scheme | None:
        """Scheme of a layer by its path in the checkpoint; None if the layer is in full precision."""
        return self.schemes.of(layer) if layer in self.layers else None

    def input_quantizer(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """Function that quantizes the inputs of the layer with the weight `name` as its scheme requires; None if they are not quantized."""
        layer = name.removesuffix(".weight")
        scheme = self.layer_scheme(layer)
        if scheme is None or scheme.activation_bits is None:
            return None
        bits = scheme.activation_bits
        if scheme.activation_strategy == "token":
            return partial(quantize_per_token, num_bits=bits)
        scale = self._part(layer, INPUT_SCALE).float()
        return lambda x: quantize_per_tensor(x, torch.zeros_like(scale).to(x.device), scale.to(x.device), bits)

    def _dequantized(self) -> dict[str, ModelTensor]:
        """Weights of the quantized layers, by name."""
        found: dict[str, ModelTensor] = {}
        for layer, shape in self.layers.items():
            layout, scheme = self._layouts[layer], self.schemes.of(layer)
            names = {part: f"{layer}.{part}" for part in layout.needed(scheme)}
            parts = {
                part: self.checkpoint.stored[name] for part, name in names.items() if name in self.checkpoint.stored
            }
            make = partial(_dequantize, layout, scheme)
            found[f"{layer}.weight"] = DerivedTensor(f"{layer}.weight", torch.float32, shape, parts, make)
        return found

    def _weight_shape(self, layer: str) -> tuple[int, int]:
        try:
            return self._layouts[layer].weight_shape(self.checkpoint, layer)
        except ValueError as error:
            raise self._damaged(layer, str(error)) from error

    def _part(self, layer: str, part: str, device: torch.device = CPU) -> Tensor:
        if f"{layer}.{part}" not in self.checkpoint.stored:
            raise self._damaged(layer, f"{part} missing")
        return self.checkpoint.read(f"{layer}.{part}", device=device)

    def _damaged(self, layer: str, fault: str) -> InputError:
        return InputError(self.file(layer), f"{fault}. {COPY_AGAIN}", tensor=layer)
