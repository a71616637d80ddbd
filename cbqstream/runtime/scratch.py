"""Memory for tensors that are needed for a moment."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """One buffer for each purpose, used again and again: the pages of a new one would take longer to come than to be written."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, purpose: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with any content. It is valid until the next one is taken for the same purpose."""
        size, held = math.prod(shape), self._buffers.get(purpose)
        if held is None or held.numel() < size or (held.dtype, held.device) != (dtype, device):
            held = self._buffers[purpose] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(*shape)
