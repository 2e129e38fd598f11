"""Projection on the dual cone: the directions that conflict with no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import subsets
from ._faces import solve_on_faces
from ._units import in_any_order, unit_gram


def dual_cone_weights(gram: Tensor, preference: Tensor, each: bool) -> Tensor:
    """Weights of the preferred sum of the gradients, projected.

    Args:
        gram: [K, K] float64.
        preference: [K], what multiplies the gradients in the sum; 1 / K for their mean.
        each: project each gradient and take the sum, instead of projecting the sum.

    Returns:
        [K] float64.
    """

    def solve(gram: Tensor, preference: Tensor) -> Tensor:
        cosines, norms, inverse = unit_gram(gram)
        lower = torch.diag(norms * preference) if each else (norms * preference)[None]
        return (_project(cosines, lower) * inverse).sum(0)

    return in_any_order(solve, gram, preference)


def _project(gram: Tensor, lower: Tensor) -> Tensor:
    """For each row u of `lower` the weights v >= u of the shortest combination: argmin v^T G v.

    sum_i v_i g_i is the projection of sum_i u_i g_i on the directions that conflict with no gradient.

    Source: UPGrad (Quinton and Rey, 2024), Proposition 1; GEM (Lopez-Paz and Ranzato, NeurIPS 2017), Eq. 11.

    Args:
        gram: [K, K] float64, whose gradients have length 1 or 0.
        lower: [R, K], not negative.

    Returns:
        [R, K]; the entry of a zero gradient stays as it is.
    """
    # v = u + x: x >= 0; no gradient conflicts with the combination, and where x_i > 0 it is orthogonal to g_i
    x, solvable = solve_on_faces(gram, -gram @ lower.T)
    v = lower.T + x  # [2^K, K, R]
    products = (gram[:, :, None] * v[:, None]).sum(2)
    missed = torch.where(subsets(len(gram), gram.device)[:, :, None], products.abs(), -products).amax(1)  # [2^K, R]
    allowed = solvable[:, None] & (x >= 0).all(1)
    best = missed.clamp(min=0).where(allowed, torch.inf).argmin(0)  # [R]
    return v[best, :, torch.arange(len(lower), device=gram.device)]
