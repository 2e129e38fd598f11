"""The record of one balanced step, and the words its options take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from torch import Tensor

Rescale = Literal["none", "sum"]
Private = Literal["own", "balanced"]
#: (gram [K, K], losses [K]) -> weights [K], or gram [K, K] -> weights [K].
Weighting = Callable[..., Any]


class Role(IntEnum):
    """How a parameter takes part in the balance: the row of `Balance.table` that its gradients are multiplied with."""

    SHARED = 0  #: in the Gram matrix
    PRIVATE = 1  #: reached by some objectives only, of which it takes the gradients
    PLAIN = 2  #: outside the balance (`balance=False`): takes the sum of the gradients


@dataclass(frozen=True)
class Balance:
    """What one balanced step measured and decided. Every field is a tensor on the gradients' device.

    Reading a field of a CUDA record stalls the device; keeping it does not.

    Attributes:
        weights: [K] float64, the weights pi of Eq. 10; exactly 0 for an objective without a gradient.
        table: [3, K] float64, what multiplies the raw gradients of shared, private and plain parameters (`Role`),
            clipped. Its rows are `coefficients` (pi_i / L_i, rescaled), `private_coefficients`, `plain_coefficients`.
        gram: [K, K] float64, inner products of the raw gradients over the balanced parameters.
        cosine: [K, K] float64, cosines between the gradients (0 where one of them is zero).
        norms: [K] float64, norms of the raw gradients.
        norm: scalar float64, norm of the combined direction before clipping, private and unbalanced
            parameters included.
        vertex: scalar bool, a weight of an objective that has a gradient is exactly 0.
        skipped: scalar bool, the step changes nothing: a gradient or a loss is not finite, a loss under a
            logarithm is not positive, or all gradients are zero.
    """

    weights: Tensor
    table: Tensor
    gram: Tensor
    cosine: Tensor
    norms: Tensor
    norm: Tensor
    vertex: Tensor
    skipped: Tensor

    @property
    def coefficients(self) -> Tensor:
        """[K] float64, what multiplies the raw gradients of shared parameters."""
        return self.table[Role.SHARED]

    @property
    def private_coefficients(self) -> Tensor:
        """[K] float64, the same for parameters that only some objectives reach."""
        return self.table[Role.PRIVATE]

    @property
    def plain_coefficients(self) -> Tensor:
        """[K] float64, the same for parameters outside the balance (`balance=False`)."""
        return self.table[Role.PLAIN]

    @property
    def conflict(self) -> Tensor:
        """Scalar bool: some pair of gradients points apart, <g_i, g_j> < 0 (the paper's GrC)."""
        return (self.gram < 0).any()

    @property
    def dominance(self) -> Tensor:
        """Scalar float64: ||g_1|| / ||g_0||, second objective over first (the paper's GrD); K >= 2."""
        return self.norms[1] / self.norms[0]
