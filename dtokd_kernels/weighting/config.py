"""ConFIG: equal cosines with all gradients, or cosines in proportion to a preference."""

from __future__ import annotations

import torch
from torch import Tensor

from ._eigen import solve_by_pseudoinverse
from ._preference import Preferred
from ._units import unit_gram


class ConFIG(Preferred):
    """The direction at the same angle to every gradient, as long as the gradients' projections on it together.

    With unit gradients u_i, their Gram matrix C and a = C^+ 1: g_u = sum_i a_i u_i / ||sum_i a_i u_i|| and
    d = (sum_i <g_i, g_u>) g_u, at most as long as the gradients together. Where gradients cancel no direction has equal
    cosines; the shortest of those that come nearest is taken, which for two opposite gradients is 0.

    Source: Liu, Chu and Thuerey (ICLR 2025), Eq. 2.

    Args:
        log_gradients: weigh the gradients of log L_i instead of those of L_i (published): only d's length differs.
        preference: what the cosines are in proportion to, a number for each objective (a = C^+ preference); None for
            equal ones. TorchJD's `pref_vector`.

    Raises:
        TypeError, ValueError: a preference that is no list of numbers from 0, or has no positive one.
    """

    _mean = False

    def _weights(self, gram: Tensor, preference: Tensor) -> Tensor:
        """All 0 for two opposite gradients."""
        cosines, norms, inverse = unit_gram(gram)
        wanted = torch.where(inverse > 0, preference, 0.0)
        a, products, _ = solve_by_pseudoinverse(cosines, wanted)  # and those with the unit gradients
        square = a @ products
        return torch.where(square > 0, (norms @ products) / square, 0.0) * a * inverse
