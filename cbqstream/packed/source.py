"""Reading a quantized checkpoint as if it were dense."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from cbqstream.checkpoint.reader import Checkpoint
from cbqstream.config import LayerSchemes, Scheme
from cbqstream.numerics.activation_quant import quantize_per_tensor, quantize_per_token
from cbqstream.numerics.affine import dequantize
from cbqstream.packed.format import INPUT_SCALE, PACKED, SCALE, SHAPE, ZERO_POINT, decode

_PARTS = (PACKED, SCALE, SHAPE, ZERO_POINT)


class PackedSource:
    """A `pack-quantized` checkpoint whose weights are dequantized one at a time as they are read."""

    def __init__(self, checkpoint: Checkpoint, schemes: LayerSchemes) -> None:
        self._checkpoint = checkpoint
        self._schemes = schemes
        cpu = torch.device("cpu")
        shapes: dict[str, tuple[int, ...]] = {}
        for name, info in checkpoint.infos.items():
            owner, _, part = name.rpartition(".")
            if part == SHAPE:
                rows, columns = checkpoint.read(name, device=cpu).tolist()
                shapes[f"{owner}.weight"] = (int(rows), int(columns))
            elif part not in (*_PARTS, INPUT_SCALE):
                shapes[name] = info.shape
        self._shapes = shapes

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every dense tensor by its name in the original checkpoint."""
        return self._shapes

    def read(self, name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """One dense tensor; a quantized weight is exact in float32 before it is converted to `dtype`."""
        if name in self._checkpoint.infos:
            return self._checkpoint.read(name, device=device, dtype=dtype)
        owner = name.removesuffix(".weight")
        parts = [part for part in _PARTS if f"{owner}.{part}" in self._checkpoint.infos]
        tensors = {part: self._checkpoint.read(f"{owner}.{part}", device=torch.device("cpu")) for part in parts}
        return dequantize(decode(tensors, self._schemes.of(owner))).to(device=device, dtype=dtype or torch.float32)

    def layer_scheme(self, layer: str) -> Scheme | None:
        """The scheme of a layer by its path in the checkpoint; None if it is in full precision."""
        return self._schemes.of(layer) if f"{layer}.{PACKED}" in self._checkpoint.infos else None

    def input_quantizer(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """As the scheme has it for a quantized weight; None for others."""
        owner = name.removesuffix(".weight")
        scheme = self._schemes.of(owner)
        bits = scheme.activation_bits
        if bits is None or f"{owner}.{PACKED}" not in self._checkpoint.infos:
            return None
        if scheme.activation_strategy == "token":
            return partial(quantize_per_token, num_bits=bits)
        scale = self._checkpoint.read(f"{owner}.{INPUT_SCALE}", device=torch.device("cpu"), dtype=torch.float32)
        return lambda x: quantize_per_tensor(x, torch.zeros_like(scale).to(x.device), scale.to(x.device), bits)
