"""The optimizer of learned parameters of which there are few: logarithms of scales, and factors."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Adam


def adam(groups: Sequence[dict[str, Any]]) -> Adam:
    """Adam over groups of parameters on one device, each with its `params` and `lr`.

    On CUDA, all parameters are updated by a few kernels, and elsewhere one after the other. Neither keeps temporary values of their size.
    """
    fused = next(iter(groups[0]["params"])).device.type == "cuda"
    return Adam(list(groups), foreach=False, fused=fused)
