"""DualProj: the mean gradient projected so that it conflicts with none."""

from __future__ import annotations

from torch import Tensor

from ._dual_cone import dual_cone_weights
from ._preference import Preferred


class DualProj(Preferred):
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

    def _weights(self, gram: Tensor, preference: Tensor) -> Tensor:
        """At least the preference where there is a gradient."""
        return dual_cone_weights(gram, preference, each=False)
