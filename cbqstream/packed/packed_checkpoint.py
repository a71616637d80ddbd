"""A quantized checkpoint that is read as if it were dense."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.errors import InputError
from cbqstream.numerics.activation_quant import quantize_per_tensor, quantize_per_token
from cbqstream.numerics.affine import dequantize
from cbqstream.packed.format import INPUT_SCALE, PACKED, SCALE, SHAPE, ZERO_POINT, decode, parts_of, shapes_of
from cbqstream.records import QuantizedWeight, TensorInfo
from cbqstream.scheme import LayerSchemes, Scheme

CPU = torch.device("cpu")
_PARTS = (PACKED, SCALE, SHAPE, ZERO_POINT, INPUT_SCALE)


class PackedCheckpoint:
    """A `pack-quantized` checkpoint whose weights are dequantized one at a time when they are read.

    Args:
        checkpoint: the stored tensors.
        schemes: schemes of the quantized layers.

    Raises:
        InputError: the tensor with the shape of a layer is missing, or does not hold two numbers.
    """

    def __init__(self, checkpoint: Checkpoint, schemes: LayerSchemes) -> None:
        self.checkpoint = checkpoint
        self.schemes = schemes
        self.layers: dict[str, tuple[int, int]] = {}
        """[O, I] of every quantized layer, by its path in the checkpoint."""
        self.others: dict[str, TensorInfo] = {}
        """Tensors that do not belong to a quantized layer, by name."""
        for name, info in checkpoint.infos.items():
            layer, _, part = name.rpartition(".")
            if part == PACKED:
                shape = self._part(layer, SHAPE)
                if shape.shape != (2,):
                    raise InputError(info.file, f"{SHAPE} is not two numbers. Copy the model again.", tensor=layer)
                rows, columns = shape.tolist()
                self.layers[layer] = (int(rows), int(columns))
            elif part not in _PARTS:
                self.others[name] = info

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every dense tensor, by its name in the original checkpoint."""
        layers = {f"{layer}.weight": shape for layer, shape in self.layers.items()}
        return {**layers, **{name: info.shape for name, info in self.others.items()}}

    def read(self, name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """One dense tensor on `device`.

        Args:
            name: name of the tensor in the original checkpoint.
            device: device of the result.
            dtype: dtype of the result. None is float32 for a quantized weight, which is then exact, and the stored dtype for others.

        Raises:
            InputError: a part of a quantized layer is missing or has another shape.
        """
        if name in self.others:
            return self.checkpoint.read(name, device=device, dtype=dtype)
        weight = self.packed(name.removesuffix(".weight"), device)
        return dequantize(weight, torch.empty(weight.codes.shape, device=device, dtype=dtype or torch.float32))

    def packed(self, layer: str, device: torch.device = CPU) -> QuantizedWeight:
        """Codes, scales and zero points of a quantized layer.

        Args:
            layer: path of the layer in the checkpoint.
            device: device of the result.

        Raises:
            InputError: a part of the layer is missing or has another shape.
        """
        scheme = self.schemes.of(layer)
        parts = {part: self._part(layer, part, device) for part in parts_of(scheme)}
        for part, shape in shapes_of(scheme, *self.layers[layer]).items():
            if parts[part].shape != shape:
                file = self.checkpoint.infos[f"{layer}.{part}"].file
                raise InputError(
                    file,
                    f"{part} has shape {list(parts[part].shape)}, not {list(shape)}. Copy the model again.",
                    tensor=layer,
                )
        return decode(parts, scheme)

    def scale_dtype(self, layer: str) -> torch.dtype:
        """Dtype in which the scales of a quantized layer are stored, which is the dtype of the original weight."""
        return self.checkpoint.infos[f"{layer}.{SCALE}"].dtype

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

    def _part(self, layer: str, part: str, device: torch.device = CPU) -> Tensor:
        if f"{layer}.{part}" not in self.checkpoint.infos:
            raise InputError(
                self.checkpoint.infos[f"{layer}.{PACKED}"].file,
                f"{part} is missing. Copy the model again.",
                tensor=layer,
            )
        return self.checkpoint.read(f"{layer}.{part}", device=device)
