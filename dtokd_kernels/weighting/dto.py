"""DTO-KD's exact rule: the shortest convex combination of the log-gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import reference


@dataclass(frozen=True)
class DTO:
    """Min-norm weights of the log-gradients.

    Source: DTO-KD (ICLR 2026), Eq. 8-12; over raw gradients it is MGDA (Desideri, 2012).

    Args:
        log_gradients: weigh g_i / L_i (Eq. 8), which no constant factor of a loss changes; False weighs g_i.
        clamp: keep the weights on the simplex (Eq. 9); False is Eq. 11 as printed, which may leave it.
    """

    log_gradients: bool = True
    clamp: bool = True

    def __call__(self, gram: Tensor, losses: Tensor | None = None) -> Tensor:
        """Weights of a Gram matrix, of log-gradients or raw ones as `log_gradients` has it.

        Args:
            gram: [K, K] float64. An objective with a zero gradient is left out.
            losses: not used.

        Returns:
            [K] float64.
        """
        return reference.min_norm_weights(gram, self.clamp, gram.diagonal() > 0)
