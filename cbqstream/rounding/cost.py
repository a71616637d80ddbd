"""Cost of a rounding method in memory, traffic and arithmetic. Planning sums the costs of all layers."""

from dataclasses import dataclass
from typing import Self

from cbqstream.config import Kernels


@dataclass(frozen=True, slots=True)
class RoundingCost:
    """Cost of learning the rounding of one layer, besides the layer's weight and its scales."""

    resident_bytes: int = 0
    """Memory on the device while the window is optimized: rounding values, gradients and optimizer states."""
    state_bytes: int = 0
    """Size in the window state, which a block that stays takes into the next window."""
    offloaded_bytes: int = 0
    """Part of `resident_bytes` that is of the size of the weight and is offloaded with it; read with the weight, written after a step."""
    step_bytes: int = 0
    """Bytes that one training step reads and writes in device memory to make the weight twice and to update the rounding."""
    step_flop: int = 0
    """Floating-point operations of that, besides the layer's own matrix products."""
    fused_step_bytes: int = 0
    """`step_bytes` with Triton kernels; 0 if it is the same."""
    tile_bytes: int = 0
    """Memory on CUDA for values of a tile of the weight during a training step. Layers are computed one after the other."""

    def step_bytes_on(self, device: str, kernels: Kernels) -> int:
        """Bytes that a training step moves on a device, `cpu` or `cuda`, with the kernels of the settings."""
        fused = device == "cuda" and kernels == "auto" and self.fused_step_bytes > 0
        return self.fused_step_bytes if fused else self.step_bytes

    def __add__(self, other: Self) -> "RoundingCost":
        sums = {name: getattr(self, name) + getattr(other, name) for name in self.__slots__}
        return RoundingCost(**sums | {"tile_bytes": max(self.tile_bytes, other.tile_bytes)})
