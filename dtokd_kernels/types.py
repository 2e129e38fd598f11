"""The records that pass between the parts of a balanced step, and the words its options take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import torch
from torch import Tensor

Rescale = Literal["none", "sum"]
Private = Literal["own", "balanced"]
#: How many objectives the kernels are made for.
MAX_OBJECTIVES = 8
#: A gradient: a tensor for each parameter, or None where the objective does not reach it.
GradientList = Sequence[Tensor | None]
#: (gram [K, K], losses [K]) -> weights [K], or gram [K, K] -> weights [K].
Weighting = Callable[..., Any]


@dataclass(frozen=True)
class Options:
    """How gradients are balanced: what the user has chosen for an optimizer or for a call of `backward`.

    Attributes:
        limit: of what a direction may be, see `limit_of`; beyond it the step is skipped.
        The others are as the arguments of `DTOAdamW`.
    """

    weighting: Weighting
    max_norm: float | None = None
    rescale: Rescale = "none"
    private: Private = "own"
    loss_floor: float = 1e-8
    backend: str | None = None
    limit: float = math.inf

    @property
    def log_gradients(self) -> bool:
        """Whether the weighting weighs log-gradients."""
        return getattr(self.weighting, "log_gradients", True)

    @property
    def needs_gram(self) -> bool:
        """Whether the weighting looks at the Gram matrix at all."""
        return getattr(self.weighting, "needs_gram", True)

    @property
    def frozen(self) -> bool:
        """Whether the weighting has stopped looking at it, for good."""
        return getattr(self.weighting, "frozen", False)

    def roles(self, reaches: Sequence[tuple[int, ...] | None]) -> list[Role]:
        """The roles of a step's parameters.

        A parameter is shared if all objectives reach it, but for those that meet no other one anywhere: one without a
        gradient, or with a head of its own on detached features, leaves the others balanced as if it were not there.

        Args:
            reaches: of each parameter, the objectives that have a gradient there; None if its group is not balanced.
        """
        balanced = [set(reach) for reach in reaches if reach is not None]
        nobody: set[int] = set()
        meeting = nobody.union(*(reach for reach in balanced if len(reach) > 1)) or nobody.union(*balanced)

        def role(reach: tuple[int, ...] | None) -> Role:
            if reach is None:
                return Role.PLAIN
            return Role.PRIVATE if len(reach) < len(meeting) and self.private == "own" else Role.SHARED

        return [role(reach) for reach in reaches]


def limit_of(dtypes: Iterable[torch.dtype]) -> float:
    """How large the elements of a direction may be where numbers of these dtypes are computed and stored.

    2^60, or 2^500 if all are float64. Squares, and so second moments, stay below 2^120 and 2^1000, and a sum of 2^60
    such directions, or one times a learning rate of 2^60, is finite in float32 and bfloat16. Float16, whose largest
    number is 65504, needs a look at what is written (`ops.run_updates`).
    """
    return 2.0**500 if all(dtype is torch.float64 for dtype in dtypes) else 2.0**60


class Role(IntEnum):
    """How a parameter takes part in the balance: the row of `Balance.table` that its gradients are multiplied with."""

    SHARED = 0  #: in the Gram matrix
    PRIVATE = 1  #: reached by some objectives only, of which it takes the gradients
    PLAIN = 2  #: outside the balance (`balance=False`): takes the sum of the gradients


@dataclass(frozen=True)
class Balance:
    """What one balanced step measured and decided. Every field but the names is a tensor on the gradients' device.

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
        skipped: scalar bool, the step changes nothing: a gradient, a loss, a weight or what the update would write is
            not finite, a loss under a logarithm is not positive, or all gradients are zero.
        names: of the K objectives, in their order; empty where `balance` got none.
    """

    weights: Tensor
    table: Tensor
    gram: Tensor
    cosine: Tensor
    norms: Tensor
    norm: Tensor
    vertex: Tensor
    skipped: Tensor
    names: tuple[str, ...] = ()

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
        """Scalar float64: ||g_1|| / ||g_0||, second objective over first (the paper's GrD).

        Raises:
            ValueError: there is one objective only.
        """
        if len(self.norms) < 2:
            raise ValueError("Balance.dominance: there is one objective, and nothing to compare it with; read norms")
        return self.norms[1] / self.norms[0]
