"""Weightings in which the user sets how much each objective counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ._arguments import check_number, filled


@dataclass(frozen=True)
class Preferred:
    """A weighting with a preference: a number for each objective, or None, for which all are alike.

    Attributes:
        log_gradients: weigh the gradients of log L_i instead of those of L_i.
        preference: from 0, with a positive one among them; TorchJD's `pref_vector`.
    """

    log_gradients: bool = False
    preference: Sequence[float] | None = None
    #: Without a preference each objective has 1 / K, as in a mean; else 1.
    _mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the preference.

        Raises:
            TypeError, ValueError: it is no list of numbers that are not negative, with a positive one among them.
        """
        rule, preference = type(self).__name__, self.preference
        if preference is None:
            return
        if isinstance(preference, (str, Tensor)) or not isinstance(preference, Sequence):
            raise TypeError(
                f"{rule}: preference is {preference!r}; pass a list of numbers, one for each objective, such as "
                "[0.7, 0.3]"
            )
        for i, value in enumerate(preference):
            check_number(rule, f"preference[{i}]", value, 0, "a finite number that is not negative", below=math.inf)
        if not any(preference):
            raise ValueError(f"{rule}: preference is {preference!r}; one number must be positive")

    def __call__(self, gram: Tensor, losses: Tensor | None = None) -> Tensor:
        """Weights [K] float64 of a Gram matrix [K, K] float64, of log-gradients or raw ones as `log_gradients` has it.

        Raises:
            ValueError: the preference does not have K numbers.
        """
        K = len(gram)
        values = [1 / K if self._mean else 1.0] * K if self.preference is None else list(self.preference)
        if len(values) != K:
            raise ValueError(
                f"{type(self).__name__}: preference has {len(values)} numbers for {K} objectives; give one each"
            )
        return self._weights(gram, filled(values, gram))

    def _weights(self, gram: Tensor, preference: Tensor) -> Tensor:
        """[K] float64, from the Gram matrix and the preference [K] float64."""
        raise NotImplementedError
