"""CAGrad: near the mean gradient, the best for the worst objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._faces import solve_on_faces
from ._units import unit_gram


@dataclass(frozen=True)
class CAGrad:
    """The direction at most c ||g_0|| from the mean gradient g_0 whose smallest <g_i, d> is largest.

    Its dual is w = argmin over the simplex of <g_w, g_0> + c ||g_0|| ||g_w|| with g_w = sum_i w_i g_i, and then
    d = g_0 + c ||g_0|| / ||g_w|| g_w. Here it is solved exactly. Inside a face F of the simplex t = c ||g_0|| / ||g_w||
    satisfies G_FF (t w_F) = lambda 1 - b_F with b = G 1/K; with y = G_FF^-1 1 and z = G_FF^-1 b_F the length of t g_w,
    c ||g_0||, says lambda: the larger root of (1^T y) lambda^2 - 2 (1^T z) lambda + b^T z - c^2 ||g_0||^2 = 0. All faces are
    solved and the best is taken. (A face around the origin has no solution, as for c < 1 the dual then decreases to its
    rim.)

    Source: Liu et al. (NeurIPS 2021), Algorithm 1; d is not divided by 1 + c^2, as their code does.

    Args:
        c: how far from the mean, in 0 <= c < 1; 0 is the mean itself.
        log_gradients: weigh the gradients of log L_i instead of those of L_i (published).

    Raises:
        ValueError: c is outside [0, 1).
    """

    c: float = 0.5
    log_gradients: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.c < 1:
            raise ValueError(f"CAGrad: c is {self.c}; pass a number with 0 <= c < 1, such as 0.5")

    def __call__(self, gram: Tensor, losses: Tensor | None = None) -> Tensor:
        """Weights of a Gram matrix of the gradients this weighting asks for.

        Args:
            gram: [K, K] float64.
            losses: not used.

        Returns:
            [K] float64, at least 1 / K each.
        """
        cosines, norms, inverse = unit_gram(gram)
        mean = norms / len(gram)  # of the unit gradients
        products = cosines @ mean
        radius2 = self.c**2 * (mean @ products).clamp(min=0)
        # with g_i = n_i u_i the condition on u_i reads C_FF (n t w)_F = lambda (1 / n)_F - products_F
        x, solvable = solve_on_faces(cosines, torch.stack([inverse, products], dim=1))
        y, z = x.unbind(2)  # [2^K, K]
        a, b = y @ inverse, z @ inverse
        root = (b * b - a * (z @ products - radius2)).clamp(min=0).sqrt()
        steps = torch.where(a[:, None] > 0, ((b + root) / a)[:, None] * y - z, 0.0)  # n t w, [2^K, K]
        totals = steps @ inverse
        found = steps / totals[:, None]  # n w
        lengths = ((found @ cosines) * found).sum(1).clamp(min=0).sqrt()
        value = found @ products + radius2.sqrt() * lengths
        allowed = solvable & (totals > 0) & (steps >= 0).all(1)
        best = torch.where(allowed, value, torch.inf).argmin()
        return 1 / len(gram) + torch.where(allowed.any(), steps[best], 0.0) * inverse
