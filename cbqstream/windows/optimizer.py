"""The optimizer of learned parameters of which there are few: logarithms of scales, and factors."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Adam


def adam(groups: Sequence[dict[str, Any]]) -> Adam:
    """Adam over groups of parameters on one device, each with its `params` and `lr`.

    On CUDA, all parameters are updated by a few kernels, and elsewhere one after the other. Neither keeps temporary values of their size.
    """
    on_cuda = any(value.device.type == "cuda" for group in groups for value in group["params"])
    return Adam(list(groups), foreach=False, fused=on_cuda)
