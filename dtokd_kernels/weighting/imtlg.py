"""IMTL-G: equal projections on all gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference import EQUAL
from ._eigen import solve_by_pseudoinverse
from ._units import unit_gram


@dataclass(frozen=True)
class IMTLG:
    """The combination with weights that sum to 1 whose projection on every gradient's direction is the same.

    With the Gram matrix C of the unit gradients they are proportional to (C^+ 1)_i / ||g_i||. Some may be negative. For
    K >= 3 the sum that they are divided by may be, too: then d points uphill for every loss, as published.

    Gradients that cancel, sum_i p_i g_i = 0 with p_i > 0, have no equal projections but 0, and as they come near that d
    goes to 0: it is at most about as long as the longest gradient times the share of the parts that the sum leaves.
    Where that is below 3e-7, the rounding of float32 gradients and of the Gram matrix, all weights are 0.

    Source: Liu et al. (ICLR 2021), its gradient balance in closed form; the pseudoinverse for dependent gradients as in
    Quinton and Rey (2024), but of C, so that the direction is invariant to the losses' units there too.

    Args:
        log_gradients: weigh the gradients of log L_i instead of those of L_i (published): only d's length differs.
    """

    log_gradients: bool = False

    def __call__(self, gram: Tensor, losses: Tensor | None = None) -> Tensor:
        """Weights of a Gram matrix, of log-gradients or raw ones as `log_gradients` has it.

        Args:
            gram: [K, K] float64.
            losses: not used.

        Returns:
            [K] float64, sums to 1; all 0 where no combination but 0 has equal projections.
        """
        cosines, _, inverse = unit_gram(gram)
        a, _, equal = solve_by_pseudoinverse(cosines, (inverse > 0).double())
        weights = a * inverse
        total = weights.sum()
        return torch.where(equal & (total.abs() > EQUAL * weights.abs().sum()), weights / total, 0.0)
