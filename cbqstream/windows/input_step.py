"""A learned step size of the inputs of a layer."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cbqstream.numerics.activation_quant import quantize_per_tensor
from cbqstream.numerics.affine import storable_scale


class InputStep(nn.Module):
    """One step size for all inputs of a layer, `s = s0 * exp(theta)`.

    Args:
        scale0: s0, float32 [1].
        num_bits: width of the codes.
    """

    scale0: Tensor

    def __init__(self, scale0: Tensor, num_bits: int) -> None:
        super().__init__()
        self.num_bits = num_bits
        self.register_buffer("scale0", scale0)
        self.theta = nn.Parameter(torch.zeros_like(scale0))

    def soft(self, x: Tensor) -> Tensor:
        """The quantized input; differentiable in x and theta."""
        return quantize_per_tensor(x, self.theta, self.scale0, self.num_bits)

    def hard(self, x: Tensor) -> Tensor:
        """The input quantized with the step size as it is stored."""
        return quantize_per_tensor(x, torch.zeros_like(self.theta), self.stored(), self.num_bits)

    @torch.no_grad()
    def stored(self) -> Tensor:
        """Step size as it is stored, float32 [1]."""
        return storable_scale(self.scale0 * self.theta.exp())

    def state(self) -> dict[str, Tensor]:
        """Copies of the values that the next window needs, by name."""
        return {"scale0": self.scale0.clone(), "theta": self.theta.detach().clone()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the values that `state` gave."""
        self.scale0.copy_(state["scale0"])
        self.theta.copy_(state["theta"])
