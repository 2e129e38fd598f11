"""UPGrad: each gradient projected so that it conflicts with none, then the mean."""

from __future__ import annotations

from torch import Tensor

from ._dual_cone import dual_cone_weights
from ._preference import Preferred


class UPGrad(Preferred):
    """The mean of the K gradients, each projected on the directions that conflict with no gradient.

    No step to first order raises a loss: <g_i, d> >= 0 for all i; and <g_i, d> grows in proportion to g_i's length.

    Source: Quinton and Rey (Jacobian descent for multi-objective optimization, 2024), Eq. 3 and Proposition 1. The
    quadratic programs are solved exactly, by trying every set of active constraints.

    Args:
        log_gradients: weigh the gradients of log L_i instead of those of L_i (published).
        preference: what multiplies the projected gradients in the sum, a number for each objective;
            None for their mean, 1 / K each. TorchJD's `pref_vector`.

    Raises:
        TypeError, ValueError: a preference that is no list of numbers from 0, or has no positive one.
    """

    def _weights(self, gram: Tensor, preference: Tensor) -> Tensor:
        """At least the preference where there is a gradient."""
        return dual_cone_weights(gram, preference, each=True)
