"""Rounding in closed form: columns of a weight are rounded one after the other, and later columns make up for the error of earlier ones.

A layer computes `y = W x` on an input x of the reference stream, and `W_hat x~` on the input x~ of the same token in the quantized stream.
With the sums over tokens

    H = sum x~ x~^T        (the Gram matrix)        C = sum (x - x~) x~^T        (the cross matrix),

the weight that minimizes `sum ||W x - W' x~||^2` without a grid is `W' = W + W C H^-1`, and the error of a weight on the grid is that of W'
plus `tr((W_hat - W') H (W_hat - W')^T)`. So W' is rounded in place of W (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). Here
`W' = W + share W C H^-1`, and the share is the best one on held-out tokens (the coefficient of CoreQ, arXiv 2602.05902).

Rounding (GPTQ, arXiv 2210.17323): with the upper Cholesky factor U of `H^-1 = U^T U`, column i is rounded to nearest, and
`(w_i - w_hat_i) U_ij / U_ii` is subtracted from every later column j.

Shapes: O output features, I input features, G groups of a row, K columns of a group, as in `affine.py`.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from cbqstream.numerics.affine import grouped, level_range
from cbqstream.scheme import Scheme

_BLOCK = 128  # columns that are rounded before the columns behind them are updated
_MOST_RAISED = 5
"""Number of times that the damping is raised tenfold if a Gram matrix is not positive definite."""


class NotPositiveDefiniteError(ValueError):
    """A Gram matrix that has no Cholesky factor, however much it is damped."""


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """Factor of the inverse of a damped Gram matrix, with its columns in the order in which a weight is rounded."""

    upper: Tensor
    """U, float32 [I, I], upper triangular: the inverse of the reordered, damped Gram matrix is U^T U."""
    order: Tensor
    """Number of the column at each position, int64 [I]."""
    damping: float
    """Damping with which it was found."""

    @classmethod
    def of(cls, gram_II: Tensor, damping: float, *, act_order: bool = True) -> Self:
        """Factor of the inverse of `H + damping mean(diag H)`.

        A column without any input is independent of all others. If the matrix is not positive definite, the damping is raised tenfold, at
        most five times.

        Args:
            gram_II: H, float32 [I, I], not changed.
            damping: share of the mean of the diagonal that is added to the diagonal.
            act_order: columns with large inputs come first; otherwise the order is that of the weight.

        Raises:
            NotPositiveDefiniteError: the matrix has no factor, or is not finite.
        """
        diagonal_I = gram_II.diagonal()
        mean = float(diagonal_I.mean())
        if not torch.isfinite(gram_II).all():
            raise NotPositiveDefiniteError("it is not finite")
        columns = len(diagonal_I)
        order = torch.arange(columns, device=gram_II.device)
        if act_order:
            order = diagonal_I.argsort(descending=True, stable=True)
        # H = R R^T with R upper triangular is a Cholesky factorization of H in reverse order, and U = R^-1
        reverse = order.flip(0)
        reversed_II = gram_II[reverse][:, reverse]
        power_I = diagonal_I[reverse]
        power_I[power_I == 0] = mean or 1.0
        for _ in range(_MOST_RAISED + 1):
            reversed_II.diagonal().copy_(power_I + damping * mean)
            lower, failed = torch.linalg.cholesky_ex(reversed_II)
            if not failed:
                identity = torch.eye(columns, device=gram_II.device, dtype=gram_II.dtype)
                inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
                del lower, identity
                if torch.isfinite(inverse).all():
                    return cls(inverse.flip(0, 1).contiguous(), order, damping)
            damping = max(damping, 1e-4) * 10
        raise NotPositiveDefiniteError("it is not positive definite")

    def solve(self, rows_OI: Tensor) -> Tensor:
        """Rows times the inverse of the damped Gram matrix, float32 [O, I]."""
        solved = torch.empty_like(rows_OI)
        solved[:, self.order] = rows_OI[:, self.order] @ self.upper.T @ self.upper
        return solved


def correction(w_OI: Tensor, cross_II: Tensor, factor: InverseFactor) -> Tensor:
    """The correction `W C H^-1` of a weight for the difference of the streams, float32 [O, I].

    Args:
        w_OI: weight, any float dtype.
        cross_II: C, float32 [I, I].
        factor: of the inverse of H of the same tokens.
    """
    return factor.solve(w_OI.float() @ cross_II)


def correction_share(w_OI: Tensor, correction_OI: Tensor, gram_II: Tensor, cross_II: Tensor) -> float:
    """The share a, from 0 to 1, with the least `sum ||W x - (W + a D) x~||^2` over held-out tokens: `tr(W C D^T) / tr(D H D^T)`.

    Args:
        w_OI: W, any float dtype.
        correction_OI: D, the correction that was found from other tokens, float32.
        gram_II: H of the held-out tokens, float32.
        cross_II: C of the held-out tokens, float32.

    Returns:
        The share; 0 if the correction changes no output.
    """
    power = ((correction_OI @ gram_II) * correction_OI).sum(dtype=torch.float64).item()
    agreement = ((w_OI.float() @ cross_II) * correction_OI).sum(dtype=torch.float64).item()
    return min(1.0, max(0.0, agreement / power)) if power > 0 else 0.0


def gptq_levels(
    w_OI: Tensor, factor: InverseFactor, scale_OG: Tensor, zero_point_OG: Tensor | None, scheme: Scheme
) -> Tensor:
    """Levels q - z of a weight, rounded column after column: float32 [O, G, K] holding integers.

    The grid of each group of columns is given, so columns can be rounded in any order.

    Args:
        w_OI: weight, any float dtype.
        factor: of the inverse of the Gram matrix of the inputs.
        scale_OG: stored scales, float32.
        zero_point_OG: zero points, int8; None if symmetric.
        scheme: how the weight is stored.
    """
    columns = w_OI.shape[1]
    group_I = factor.order // (columns // scale_OG.shape[1])
    w_IO = w_OI.float().T[factor.order].contiguous()
    scale_GO = scale_OG.T.contiguous()
    bounds = [
        bound[..., 0].T.contiguous() if isinstance(bound, Tensor) else bound
        for bound in level_range(scheme, zero_point_OG)
    ]
    levels_IO = torch.empty_like(w_IO)
    groups = group_I.tolist()
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors_KO = torch.empty_like(w_IO[start:stop])
        for column in range(start, stop):
            scale_O = scale_GO[groups[column]]
            low, high = (bound[groups[column]] if isinstance(bound, Tensor) else bound for bound in bounds)
            levels_O = torch.div(w_IO[column], scale_O, out=levels_IO[column]).round_().clamp_(low, high)  # type: ignore[arg-type]  # both are numbers or both are tensors
            row_I = factor.upper[column]
            error_O = torch.addcmul(w_IO[column], levels_O, scale_O, value=-1, out=errors_KO[column - start])
            error_O.div_(row_I[column])
            w_IO[column + 1 : stop].addr_(row_I[column + 1 : stop], error_O, alpha=-1)
        w_IO[stop:].addmm_(factor.upper[start:stop, stop:].T, errors_KO, alpha=-1)
    levels_OI = torch.empty_like(w_OI, dtype=torch.float32)
    levels_OI[:, factor.order] = levels_IO.T
    return grouped(levels_OI, scale_OG.shape[1])
