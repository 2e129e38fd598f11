"""Aligned-MTL: the gradients' principal components, all of one length."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import EQUAL
from ._eigen import eigh
from ._preference import Preferred


class AlignedMTL(Preferred):
    """The mean of the gradients after their matrix has been replaced by the nearest one with equal singular values.

    With G = V diag(lambda) V^T and lambda_R its smallest eigenvalue that is not 0, the weights are
    sqrt(lambda_R) V diag(lambda^-1/2) V^T p, with p = 1/K or the preference, over the eigenvalues that are not 0. They
    may be negative.

    Source: Senushkin et al. (CVPR 2023), Algorithm 1, with the smallest singular value as the common one. The result
    depends on the gradients' units, and on what counts as 0: eigenvalues below a share of 1e-13 of the largest.

    Args:
        log_gradients: weigh the gradients of log L_i instead of those of L_i (published).
        preference: what multiplies the aligned gradients in the sum, a number for each objective; None for their mean,
            1 / K each. TorchJD's `pref_vector`.

    Raises:
        TypeError, ValueError: a preference that is no list of numbers from 0, or has no positive one.
    """

    def _weights(self, gram: Tensor, preference: Tensor) -> Tensor:
        values, vectors = eigh(gram.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
        counted = values > EQUAL * values.amax()
        smallest = values.where(counted, torch.inf).amin()
        scale = torch.where(counted, (smallest / values).sqrt(), 0.0)
        return vectors @ (scale * (vectors * preference[:, None]).sum(0))
