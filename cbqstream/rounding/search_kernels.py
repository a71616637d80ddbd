"""Choice of the kernels of the search of a grid. Formula: `numerics/scale_search.py`."""

from typing import Protocol

import torch
from torch import Tensor

from cbqstream.numerics.scale_search import search_grid
from cbqstream.rounding.kernels import KernelSet
from cbqstream.scheme import Scheme


class SearchKernels(Protocol):
    """The search, as `scale_search.search_grid` documents it."""

    def search_grid(self, w_OI: Tensor, second_moment_I: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
        """Scale float32 [O, G], and zero point int8 [O, G] or None if symmetric."""
        ...


class PlainKernels:
    """The search with torch alone, on any device."""

    search_grid = staticmethod(search_grid)


def _launch_all(kernels: SearchKernels, device: torch.device) -> None:
    kernels.search_grid(
        torch.ones(1, 16, device=device), torch.ones(16, device=device), Scheme(num_bits=4, group_size=None)
    )


KERNELS: KernelSet[SearchKernels] = KernelSet(PlainKernels(), "cbqstream.rounding.search_triton", _launch_all)
"""The kernels of the search."""
