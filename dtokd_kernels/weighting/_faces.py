"""Small quadratic programs, exactly: each choice of what may differ from 0 is solved, all 2^K at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import EQUAL, solve_systems, subsets


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
    inside = subsets(K, matrix.device)
    identity = torch.eye(K, dtype=matrix.dtype, device=matrix.device)
    systems = torch.where(inside[:, :, None] & inside[:, None, :], matrix, identity)
    return solve_systems(systems, torch.where(inside[:, :, None], right, 0.0), EQUAL)


def minimum_from_0(matrix: Tensor, right: Tensor) -> Tensor:
    """Where x^T M x / 2 - r^T x is smallest over x >= 0; at the solution of a set it is -r^T x / 2.

    Args:
        matrix: [K, K] float64, as that of `solve_on_faces`.
        right: [K].

    Returns:
        [K] float64.
    """
    x, solvable = solve_on_faces(matrix, right[:, None])
    x = x[:, :, 0]
    gains = (x @ right).where(solvable & (x >= 0).all(1), -torch.inf)
    return x[gains.argmax(0, keepdim=True)][0]
