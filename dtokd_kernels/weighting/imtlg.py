"""IMTL-G: equal projections on all gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._eigen import solve_by_pseudoinverse
from ._units import unit_gram


@dataclass(frozen=True)
class IMTLG:
    """The combination with weights that sum to 1 whose projection on every gradient's direction is the same.

    With the Gram matrix C of the unit gradients they are proportional to (C^+ 1)_i / ||g_i||. Some may be negative. For
    K >= 3 the sum that they are divided by may be, too: then d points uphill for every loss, as published.

    Source: Liu et al. (ICLR 2021), its gradient balance in closed form; the pseudoinverse for dependent gradients as in
    Quinton and Rey (2024), but of C, so that the direction is invariant to the losses' units there too.

    Args:
        log_gradients: weigh the gradients of log L_i instead of those of L_i (published): only d's length differs.
    """

    log_gradients: bool = False

    def __call__(self, gram: Tensor, losses: Tensor | None = None) -> Tensor:
        """Weights of a Gram matrix of the gradients this weighting asks for.

        Args:
            gram: [K, K] float64.
            losses: not used.

        Returns:
            [K] float64, sums to 1; all 0 where no combination but 0 has equal projections (opposite gradients).
        """
        cosines, _, inverse = unit_gram(gram)
        weights = solve_by_pseudoinverse(cosines, (inverse > 0).double()) * inverse
        total = weights.sum()
        return torch.where(total != 0, weights / total, 0.0)
