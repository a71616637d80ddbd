"""Rounding method `gptq`: the codes of each layer are computed in closed form from the inputs of the layer, without training.

Formulas: `numerics/gptq.py`. `windows/closed_form.py` gathers the inputs and gives each layer its codes. Until then, and if the codes of a
window are reverted, a weight is rounded to nearest.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from cbqstream.config import ReconstructionConfig
from cbqstream.numerics.affine import codes_of_levels, grouped
from cbqstream.rounding.cost import RoundingCost
from cbqstream.rounding.nearest import Nearest
from cbqstream.rounding.rounding import RoundingStart
from cbqstream.runtime.offload import OffloadedTensor


class Gptq(Nearest):
    """A weight whose codes are given."""

    name = "gptq"
    closed_form = True
    large = ("weight", "codes")
    codes: Tensor
    """q, int8 [O, I]; [0, I] while the weight is rounded to nearest."""

    def __init__(self, start: RoundingStart) -> None:
        super().__init__(start)
        self.register_buffer("codes", self._no_codes(start.weight.device))

    @classmethod
    @override
    def cost(cls, config: ReconstructionConfig, rows: int, columns: int) -> RoundingCost:
        codes = rows * columns
        return RoundingCost(resident_bytes=codes, state_bytes=codes, offloaded_bytes=codes)

    @override
    def levels(self, rows: slice, scale_OG: Tensor) -> Tensor:
        """Levels for the starting scale; `scale_OG` matters only while the weight is rounded to nearest. See `Rounding.levels`."""
        if not len(self.codes):
            return super().levels(rows, scale_OG)
        levels_OGK = grouped(self.codes[rows].float(), scale_OG.shape[1])
        zero_point_OG = self.zero_point_of(rows)
        return levels_OGK if zero_point_OG is None else levels_OGK.sub_(zero_point_OG.float().unsqueeze(-1))

    @torch.no_grad()
    def assign(self, scale_OG: Tensor, zero_point_OG: Tensor | None, levels_OGK: Tensor) -> None:
        """Give the weight its grid and its levels q - z.

        Args:
            scale_OG: stored scales, float32.
            zero_point_OG: zero points, int8; None if symmetric.
            levels_OGK: levels, float32 holding integers.
        """
        self.scale0.copy_(scale_OG)
        if self.zero_point is not None and zero_point_OG is not None:
            self.zero_point.copy_(zero_point_OG)
        self.put("codes", codes_of_levels(levels_OGK, zero_point_OG))

    @override
    def large_state(self) -> dict[str, Tensor | OffloadedTensor]:
        stored = self.offloaded("codes")
        codes = stored or self.codes
        return {"codes": codes} if codes.shape[0] else {}

    @override
    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load({name: value for name, value in state.items() if name != "codes"})
        self.put("codes", state["codes"] if "codes" in state else self._no_codes(self.scale0.device))

    def _no_codes(self, device: torch.device) -> Tensor:
        return torch.empty(0, self.weight.shape[1], dtype=torch.int8, device=device)
