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

    With unit gradients u_i, their Gram matrix C and u_i^T d = const: weights proportional to (C^+ 1)_i / ||g_i||. Weights may be
    negative; for K >= 3 their sum before normalisation may be, too, and then d ascends on all losses.

    Source: Liu et al. (ICLR 2021), its gradient balance in closed form; the pseudoinverse for dependent gradients as in
    Quinton and Rey (2024), but of C, so that the direction is invariant to the losses' units there too.

    Args:
        log_gradients: weigh the gradients of log L_i instead of those of L_i (published): the same direction, other length.
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
