"""CAGrad: near the mean gradient, the best for the worst objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._arguments import check_number
from ._faces import solve_on_faces
from ._units import in_any_order, unit_gram


@dataclass(frozen=True)
class CAGrad:
    """The direction at most c ||g_0|| from the mean gradient g_0 whose smallest <g_i, d> is largest.

    That is d = g_0 + t sum_i w_i g_i for some w in the simplex and t >= 0, at the distance c ||g_0||. The objectives
    with w_i > 0 share the smallest <g_i, d> = lambda: for their set F, and with b = G 1/K,

        t w_F = lambda y - z,   G_FF y = 1,   G_FF z = b_F,
        (1^T y) lambda^2 - 2 (1^T z) lambda + b^T z = c^2 ||g_0||^2      (the distance; lambda is the larger root).

    Where gradients cancel no direction is good for all: lambda = 0, and d may be nearer. So all sets F are solved, for
    both; every d found is within the distance, and the one whose smallest <g_i, d> is largest is the solution.

    Source: Liu et al. (NeurIPS 2021), Algorithm 1, which leaves the search for w to a general minimiser. d is not
    divided by 1 + c^2, as their code does.

    Args:
        c: how far from the mean, in 0 <= c < 1; 0 is the mean itself.
        log_gradients: weigh the gradients of log L_i instead of those of L_i (published).

    Raises:
        ValueError: c is outside [0, 1).
    """

    c: float = 0.5
    log_gradients: bool = False

    def __post_init__(self) -> None:
        check_number("CAGrad", "c", self.c, 0, "a number with 0 <= c < 1, such as 0.5", below=1)

    def __call__(self, gram: Tensor, losses: Tensor | None = None) -> Tensor:
        """Weights of a Gram matrix, of log-gradients or raw ones as `log_gradients` has it.

        Args:
            gram: [K, K] float64.
            losses: not used.

        Returns:
            [K] float64, at least 1 / K each.
        """
        return in_any_order(lambda gram, _: cagrad_weights(gram, self.c), gram, torch.ones_like(gram[0]))


def cagrad_weights(gram: Tensor, c: float) -> Tensor:
    """Weights [K] of a Gram matrix [K, K] float64, at most c from the mean."""
    cosines, norms, inverse = unit_gram(gram)
    mean = norms / len(gram)  # g_0, of unit gradients
    products = cosines @ mean
    distance2 = c**2 * (mean @ products).clamp(min=0)
    # for unit gradients lambda 1 becomes lambda / ||g_i||, and what is solved for is t w_i ||g_i||
    solutions, solvable = solve_on_faces(cosines, torch.stack([inverse, products], dim=1))
    y, z = solutions.unbind(2)  # [2^K, K]
    a, b = y @ inverse, z @ inverse
    length2 = z @ products
    radicand = b * b - a * (length2 - distance2)
    largest = torch.where(a > 0, (b + radicand.clamp(min=0).sqrt()) / a, 0.0)[:, None]
    steps = torch.stack([largest * y - z, -z])  # [2, 2^K, K]
    within = torch.stack([radicand >= 0, length2 <= distance2])
    allowed = solvable & within & (steps >= 0).all(2)
    along_y, along_z = ((cosines * v[:, None, :]).sum(2) for v in (y, z))
    gains = norms * (products + torch.stack([largest * along_y - along_z, -along_z]))  # <g_i, d>
    worst = torch.where(norms > 0, gains, torch.inf).amin(2)
    best = torch.where(allowed, worst, -torch.inf).flatten().argmax(0, keepdim=True)  # [1]: a scalar would be read
    return 1 / len(gram) + steps.flatten(0, 1)[best][0] * inverse
