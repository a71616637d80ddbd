"""Memory for tensors that are needed only for a short time."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Buffers that are reused, one for each purpose.

    The memory pages of a new buffer would take longer to allocate than to write.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, purpose: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with undefined content, valid until the next tensor is taken for the same purpose.

        Args:
            purpose: name of the buffer.
            shape: shape of the tensor.
            dtype: dtype of the tensor.
            device: device of the tensor.
        """
        size, held = math.prod(shape), self._buffers.get(purpose)
        if held is None or held.numel() < size or (held.dtype, held.device) != (dtype, device):
            held = self._buffers[purpose] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(*shape)
