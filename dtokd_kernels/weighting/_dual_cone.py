"""Projection on the dual cone: the directions that conflict with no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ._faces import solve_on_faces
from ._units import unit_gram


def dual_cone_weights(gram: Tensor, each: bool) -> Tensor:
    """Weights of the mean gradient, projected.

    Args:
        gram: [K, K] float64.
        each: project each gradient and take the mean, instead of projecting the mean.

    Returns:
        [K] float64.
    """
    cosines, norms, inverse = unit_gram(gram)
    lower = torch.diag(norms) if each else norms[None] / len(gram)
    return (_project(cosines, lower) * inverse).mean(0)


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
    # v = u + x: x >= 0, and where x_i > 0 the combination is orthogonal to g_i; then v^T G v = u^T G u - right^T x
    right = -gram @ lower.T
    x, solvable = solve_on_faces(gram, right)
    allowed = solvable[:, None] & (x >= 0).all(1)
    gains = (right * x).sum(1)  # [2^K, R]
    best = gains.where(allowed, -torch.inf).argmax(0)  # [R]
    return lower + x[best, :, torch.arange(len(lower), device=gram.device)]
