"""The Gram matrix of gradients of length 1, so that no threshold depends on the objectives' scales."""

from __future__ import annotations

import torch
from torch import Tensor


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
