"""Learned rounding with one value per weight, `full` mode (SignRound, Cheng et al. 2023, eq. 3).

    w_hat = s * clamp(round(w / s + v), qmin - z, qmax - z),    s = s0 * exp(theta),    v in [-1/2, 1/2]

with the straight-through estimator d round(x) / dx = 1, so that

    d w_hat / d theta = s * (q - z - [in range] w / s)        (LSQ, Esser et al. 2020, eq. 3; d s / d theta = s)
    d w_hat / d v     = s * [in range]

and v is moved by the sign of its gradient as soon as the backward pass knows it: it needs no gradient and no optimizer state in memory.

Shapes as in `affine.py`. On the CPU the passes go in tiles of rows that fit in the cache, and all in float32: a comparison or a mixed dtype
takes three to eight times as long as the same thing in arithmetic.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self, cast

import torch
from torch import Tensor

from cbqstream.config import Kernels
from cbqstream.errors import UsageError, shown
from cbqstream.numerics.affine import Bound, clamp_levels, grouped, row_tiles, rows_of
from cbqstream.runtime.scratch import Scratch


class Passes(Protocol):
    """The two passes over a weight. Scales are s, float32 [O, G]."""

    def soft(self, w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound, out_OI: Tensor) -> None:
        """Write w_hat into `out_OI`, in its dtype."""
        ...

    def move(
        self, w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound, gradient_OI: Tensor, step: float
    ) -> Tensor:
        """The gradient of theta, float32 [O, G], from that of w_hat; v moves by `step` against the sign of its own."""
        ...


def rounded_levels(w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound) -> Tensor:
    """clamp(round(w / s + v)), float32 [O, G, K]."""
    groups = scale_OG.shape[1]
    levels = grouped(w_OI.float(), groups) / scale_OG.unsqueeze(-1)
    return clamp_levels(levels.add_(grouped(v_OI.float(), groups)).round_(), low, high)


class Plain:
    """In tiles of rows, with torch alone."""

    def soft(self, w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound, out_OI: Tensor) -> None:
        """See `Passes`."""
        scale_OG1, groups = scale_OG.unsqueeze(-1), scale_OG.shape[1]
        for rows in row_tiles(w_OI):
            levels = rounded_levels(w_OI[rows], scale_OG[rows], v_OI[rows], rows_of(low, rows), rows_of(high, rows))
            torch.mul(levels, scale_OG1[rows], out=grouped(out_OI[rows], groups))

    def move(
        self, w_OI: Tensor, scale_OG: Tensor, v_OI: Tensor, low: Bound, high: Bound, gradient_OI: Tensor, step: float
    ) -> Tensor:
        """See `Passes`."""
        scale_OG1, groups = scale_OG.unsqueeze(-1), scale_OG.shape[1]
        gradient_OG = torch.empty_like(scale_OG)
        for rows in row_tiles(w_OI):
            gradient, v = grouped(gradient_OI[rows].float(), groups), grouped(v_OI[rows].float(), groups)
            w_over_s = grouped(w_OI[rows].float(), groups) / scale_OG1[rows]
            levels = (w_over_s + v).round_()
            clamped = levels.clamp(rows_of(low, rows), rows_of(high, rows))  # type: ignore[arg-type]
            inside = levels.sub_(clamped).abs_().clamp_(max=1).neg_().add_(1)  # 1 or 0: levels are whole numbers
            slope = clamped.addcmul_(w_over_s, inside, value=-1).mul_(gradient)
            torch.mul(slope.sum(-1), scale_OG[rows], out=gradient_OG[rows])
            v.sub_(inside.mul_(torch.sign(gradient)), alpha=step).clamp_(-0.5, 0.5)
            v_OI[rows] = v.flatten(1)
        return gradient_OG


def passes_for(kernels: Kernels, device: torch.device) -> Passes:
    """The plain ones on the CPU, or where they are asked for; on CUDA those of `straight_through_triton.py`.

    Raises:
        UsageError: triton is not installed.
    """
    if kernels == "plain" or device.type == "cpu":
        return Plain()
    try:
        return cast("Passes", importlib.import_module("cbqstream.rounding.straight_through_triton"))
    except ImportError as error:
        raise UsageError(f"triton cannot be loaded ({error}). Install it, or use --kernels plain.") from error


def require_kernels(kernels: Kernels, device: torch.device) -> None:
    """Launch those of `passes_for` once: Triton compiles at the first launch, which needs a C compiler.

    Raises:
        UsageError: they do not run.
    """
    passes = passes_for(kernels, device)
    if isinstance(passes, Plain):
        return
    w_OI, scale_OG = torch.zeros(1, 16, device=device), torch.ones(1, 1, device=device)
    try:
        passes.soft(w_OI, scale_OG, w_OI.half(), -8.0, 7.0, torch.empty_like(w_OI))
        passes.move(w_OI, scale_OG, w_OI.half(), -8.0, 7.0, w_OI, 0.0)
    except Exception as error:  # whatever a compiler may say
        said = shown(str(error).partition("\n")[0])
        raise UsageError(
            f"Triton's kernels do not run ({said}). Install a C compiler and Python's headers, or use --kernels plain."
        ) from error


@dataclass(frozen=True, slots=True)
class StraightThrough:
    """A weight whose rounding is learned."""

    weight: Tensor
    """w [O, I], any float dtype."""
    scale0: Tensor
    """s0, float32 [O, G]."""
    v: Tensor
    """float16 [O, I]; moved in place."""
    low: Bound
    high: Bound
    step: float
    """How far v moves in a backward pass."""
    passes: Passes
    scratch: Scratch

    by_rows: ClassVar[tuple[bool, ...]] = (True,)

    def part(self, rows: slice) -> Self:
        """See `LearnedWeight`."""
        of_rows = {name: rows_of(getattr(self, name), rows) for name in ("weight", "scale0", "v", "low", "high")}
        return replace(self, **of_rows)  # type: ignore[arg-type]

    def soft(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """See `LearnedWeight`; the one parameter is theta [O, G]."""
        (theta_OG,) = parameters
        w_hat = self.scratch.take("weight", self.weight.shape, dtype, self.weight.device)
        self.passes.soft(self.weight, self.scale0 * theta_OG.exp(), self.v, self.low, self.high, w_hat)
        return w_hat

    def levels(self, parameters: Sequence[Tensor], scale_OG: Tensor) -> Tensor:
        """See `LearnedWeight`."""
        return rounded_levels(self.weight, scale_OG, self.v, self.low, self.high)

    def gradients(self, parameters: Sequence[Tensor], gradient_OI: Tensor) -> tuple[Tensor, ...]:
        """See `LearnedWeight`; v moves."""
        (theta_OG,) = parameters
        scale_OG = self.scale0 * theta_OG.exp()
        return (self.passes.move(self.weight, scale_OG, self.v, self.low, self.high, gradient_OI, self.step),)
