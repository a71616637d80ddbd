"""Weights and layers for a trial of the code of a model: they take almost no memory, and record their use."""

import zlib
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from cbqstream.models.meta_model import MetaModel

ROWS = 512
"""Number of rows of the embedding and the head that are used."""
_SIZE = 0.05
"""Standard deviation of the weights."""


class WatchedLinear(nn.Linear):
    """A linear layer that records whether it is called, and whether other code than its own uses its weight.

    It computes with a weight of rank one, the product of the first column and the first row of its weight, which is much faster.
    """

    calls = 0
    reads = 0

    def forward(self, x: Tensor) -> Tensor:
        """The output [..., O] for inputs [..., I]."""
        self.calls += 1
        weight_OI, bias = self._parameters["weight"], self._parameters.get("bias")
        if weight_OI is None:
            raise RuntimeError("the layer has no weight")
        y = (x @ weight_OI[0]).unsqueeze(-1) * weight_OI[:, 0]
        return y if bias is None else y + bias

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.reads += 1
        return super().__getattr__(name)

    @classmethod
    def replacing(cls, linear: nn.Module) -> Self:
        """Make a linear layer record its use, in place."""
        linear.__class__ = type(f"Watched{type(linear).__name__}", (cls, type(linear)), {})
        return cast("Self", linear)


class TrialWeights:
    """Random weights of a model that take almost no memory: the value at [i, j, ...] depends only on i + j + ..."""

    def __init__(self, meta_model: MetaModel) -> None:
        self._shapes = {name: info.shape for name, info in meta_model.infos.items()}
        self._vocab_size = meta_model.vocab_size

    def read(self, name: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Random values in the shape of a tensor; zeros if the dtype has only integers. Embedding and head have at most 512 rows."""
        shape, dtype = list(self._shapes[name]), dtype or torch.float32
        if len(shape) == 2 and shape[0] == self._vocab_size:
            shape[0] = min(ROWS, shape[0])
        if not dtype.is_floating_point or 0 in shape:
            return torch.zeros(1, dtype=dtype, device=device).expand(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = _SIZE * torch.randn(1 + sum(size - 1 for size in shape), generator=generator)
        if len(shape) == 1:
            values += 1  # norms scale by values near 1
        return values.to(device, dtype).as_strided(shape, [1] * len(shape))

    def input_quantizer(self, name: str) -> None:
        """Return None, because inputs are not quantized."""
