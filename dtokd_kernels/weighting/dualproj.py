"""DualProj: the mean gradient projected so that it conflicts with none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ._dual_cone import dual_cone_weights
from ._preference import check_preference, preference_of


@dataclass(frozen=True)
class DualProj:
    """The mean of the K gradients, projected on the directions that conflict with no gradient.

    Source: GEM (Lopez-Paz and Ranzato, NeurIPS 2017), Eq. 11, the dual of its projection; named as in TorchJD. The
    quadratic program is solved exactly, by trying every set of active constraints.

    Args:
        log_gradients: weigh the gradients of log L_i instead of those of L_i (published).
        preference: what multiplies the gradients in the sum, a number for each objective; None for their
            mean, 1 / K each. TorchJD's `pref_vector`.

    Raises:
        TypeError, ValueError: a preference that is no list of numbers from 0, or has no positive one.
    """

    log_gradients: bool = False
    preference: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_preference("DualProj", self.preference)

    def __call__(self, gram: Tensor, losses: Tensor | None = None) -> Tensor:
        """Weights of a Gram matrix of the gradients this weighting asks for.

        Args:
            gram: [K, K] float64.
            losses: not used.

        Returns:
            [K] float64, at least the preference (1 / K without one) where there is a gradient.
        """
        return dual_cone_weights(gram, preference_of("DualProj", self.preference, 1 / len(gram), gram), False)
