"""Small quadratic programs, exactly: each choice of what may differ from 0 is solved, all 2^K at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import EQUAL, solve_systems


def solve_on_faces(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """For each set F of objectives the x with matrix_FF x_F = right_F and x = 0 elsewhere.

    A convex program over x >= 0 has its solution among these: those objectives that the solution uses, without any
    that depend linearly on the others. Which one it is the caller knows by its value.

    Args:
        matrix: [K, K] float64, positive semidefinite, its diagonal 1 (or 0: that objective is in no set).
        right: [K, R].

    Returns:
        solutions [2^K, K, R], 0 where there is none; and [2^K] bool, whether there is one: elimination's pivots,
        sin^2 of the angle between a unit gradient and those before it, are more than rounding. Row m is for the set of
        the objectives whose bits are set in m; row 0, the empty set, has the solution 0.
    """
    K = len(matrix)
    sets = torch.arange(1 << K, device=matrix.device)[:, None]
    inside = (sets >> torch.arange(K, device=matrix.device)) & 1 > 0  # [2^K, K]
    identity = torch.eye(K, dtype=matrix.dtype, device=matrix.device)
    systems = torch.where(inside[:, :, None] & inside[:, None, :], matrix, identity)
    return solve_systems(systems, torch.where(inside[:, :, None], right, 0.0), EQUAL)


def project_on_dual_cone(gram: Tensor, lower: Tensor) -> Tensor:
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
