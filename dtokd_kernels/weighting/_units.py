"""What no rule may depend on: the objectives' scales in its thresholds, and their order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference import share_equally


def unit_gram(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines of the gradients and their norms.

    Args:
        gram: [K, K] float64.

    Returns:
        cosines [K, K], 0 in the row of a zero gradient and where the Gram matrix is not finite (that step is skipped);
        norms [K]; and inverse norms [K], 0 for a zero gradient.
    """
    norms = gram.diagonal().sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    cosines = (gram * inverse[:, None] * inverse).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return cosines, norms, inverse


def in_any_order(solve: Callable[[Tensor, Tensor], Tensor], gram: Tensor, preference: Tensor) -> Tensor:
    """Weights that go along when the objectives are put in another order, also where rounding decides.

    Where gradients are linearly dependent many weights give one direction, and elimination finds those of the order
    that it goes in. So the objectives are solved for in an order of their own, and equal gradients share.

    Args:
        solve: from a Gram matrix and a preference to weights.
        gram: [K, K] float64.
        preference: [K].

    Returns:
        [K] float64.
    """
    cosines, norms, _ = unit_gram(gram)
    others = cosines - cosines.diagonal().diag()
    order = torch.arange(len(gram), device=gram.device)
    for key in (preference, others.abs().amin(1), others.amax(1), others.amin(1), norms):
        order = order[key[order].argsort(stable=True)]
    weights = torch.empty_like(norms).scatter_(0, order, solve(gram[order][:, order], preference[order]))
    return share_equally(gram, weights, torch.ones_like(norms, dtype=torch.bool))
