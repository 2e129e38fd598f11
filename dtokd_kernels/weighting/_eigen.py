"""Eigenvalues of small symmetric matrices, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import EQUAL

#: Sweeps of Jacobi's method: it converges quadratically, K = 8 needs 6 (`test_jacobi`).
SWEEPS = 7


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [K] and eigenvectors [K, K] (columns) of a symmetric matrix [K, K], in any order.

    On CUDA `torch.linalg.eigh` reads an error code back, which stalls the device: Jacobi's method there.
    """
    if matrix.device.type == "cpu":
        return torch.linalg.eigh(matrix)
    return jacobi(matrix)


def jacobi(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`eigh` by plane rotations, K / 2 disjoint ones at once: a round robin in which every pair meets once a sweep.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, sections 8.5.2 and 8.5.6.
    """
    K = len(matrix)
    n = K + K % 2  # an odd one out rests with a row of zeros
    A = torch.nn.functional.pad(matrix, (0, n - K, 0, n - K))
    V = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    seats = torch.arange(n, device=matrix.device)
    # seats (0, 1), (2, 3), ... meet; then all but the first move on by one place around the table
    table = torch.cat([seats[:1], seats[2::2], seats[1::2].flip(0)])  # around the table, from the first
    around = torch.cat([table[:1], table[1:].roll(1)])
    moved = torch.empty_like(seats).scatter_(0, table, around)
    for _ in range(SWEEPS * (n - 1)):
        upper, lower, between = A.diagonal()[0::2], A.diagonal()[1::2], A.diagonal(1)[0::2]
        half = (lower - upper) / 2
        # tan of the smaller angle; 0 where the entry is 0 already
        length = torch.hypot(half, between)
        t = torch.where(between == 0, 0.0, between / (half + torch.where(half >= 0, length, -length)))
        c = (1 + t * t).rsqrt()
        s = t * c
        rotations = torch.stack([torch.stack([c, s], 1), torch.stack([-s, c], 1)], 1)  # [n / 2, 2, 2], columns rotated
        A = _rotate(_rotate(A, rotations).T, rotations)[moved][:, moved]
        V = _rotate(V.T, rotations)[moved].T
    return A.diagonal()[:K], V[:K, :K]


def _rotate(A: Tensor, rotations: Tensor) -> Tensor:
    """The rows 2 i, 2 i + 1 of A replaced by their combinations with the columns of rotation i."""
    return (rotations.mT @ A.reshape(len(rotations), 2, -1)).view_as(A)


def solve_by_pseudoinverse(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The shortest x [K] of those that come nearest to matrix x = right; matrix [K, K] positive semidefinite.

    Eigenvalues below a share of `EQUAL` of the largest are rounding of the Gram matrix, and count as 0. So are parts of
    `right` along an eigenvector whose square is below that share of the whole.

    Returns:
        x [K]; matrix x [K], the part of `right` that can be had; and scalar bool, whether that is all of it.
    """
    values, vectors = eigh(matrix)
    parts = vectors.T @ right
    counted = values > EQUAL * values.amax()
    there = parts.square() > EQUAL * right.square().sum()
    parts = parts.where(there & counted, 0.0)
    return vectors @ torch.where(counted, parts / values, 0.0), vectors @ parts, ~(there & ~counted).any()
