"""Nash-MTL: the bargaining solution of the objectives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._units import unit_gram

#: Added to the cosines' diagonal: gradients that cancel have no solution, and this bounds their weights.
RIDGE = 1e-10


@dataclass(frozen=True)
class NashMTL:
    """The direction in a ball that maximises the product of the objectives' gains <g_i, d>.

    The weights satisfy G a = 1 / a elementwise, a > 0: there the convex 1/2 a^T G a - sum_i log a_i is smallest, and
    Newton's method with damped steps finds it from anywhere. It runs on unit gradients, b_i = ||g_i|| a_i, and gives b
    its best length after each step. (The published algorithm comes to the same point by a sequence of convex programs
    that starts at the last step's solution; here no memory is needed.)

    ||d|| = sqrt(K) whatever the gradients' lengths are: clip with `max_norm`, as the paper's code does at 1. The units
    of the losses don't matter. Gradients that cancel have no solution: the weights would grow without bound, and are
    kept below 1e5 sqrt(K) / ||g_i||.

    Source: Navon et al. (ICML 2022), Algorithm 1.

    Args:
        log_gradients: weigh the gradients of log L_i instead of those of L_i (published); d is the same.
    """

    log_gradients: bool = False

    def __call__(self, gram: Tensor, losses: Tensor | None = None) -> Tensor:
        """Weights of a Gram matrix, of log-gradients or raw ones as `log_gradients` has it.

        Args:
            gram: [K, K] float64.
            losses: not used.

        Returns:
            [K] float64, positive where there is a gradient.
        """
        K = len(gram)
        cosines, _, inverse = unit_gram(gram)
        identity = torch.eye(K, dtype=torch.float64, device=gram.device)
        # a zero gradient takes no part: as if it were orthogonal to all
        cosines = cosines + identity * torch.where(inverse > 0, RIDGE, 1.0)
        b = torch.ones_like(inverse)
        # two gradients need 1 step; 16 (K = 3) to 32 are enough where the gradients cancel up to a share of 1e-3
        for _ in range(min(8 * (K - 1), 32)):
            scaled = b[:, None] * cosines * b
            residual = scaled.sum(1) - 1
            step, _ = torch.linalg.solve_ex(scaled + identity, residual)
            b = b * (1 - step / (1 + (residual @ step).sqrt()))  # the root is Newton's decrement
            b = b * (K / (b @ cosines @ b)).sqrt()
        return b * inverse
