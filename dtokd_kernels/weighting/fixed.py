"""Weights that do not depend on the gradients: the baselines to beat."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._arguments import check_number, filled


@dataclass(frozen=True)
class Fixed:
    """A weighted sum of the losses (Eq. 3, 4), or of their logarithms.

    Args:
        weights: one number per objective; None weighs all by 1 / K.
        log_gradients: weigh the gradients of log L_i instead of those of L_i.

    Raises:
        TypeError, ValueError: `weights` is no list of finite numbers.
    """

    weights: Sequence[float] | None = None
    log_gradients: bool = False
    needs_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        try:
            weights = list(self.weights)
        except TypeError as error:
            message = f"Fixed: weights is {self.weights!r}; pass a list of numbers, one for each objective"
            raise TypeError(message) from error
        for i, weight in enumerate(weights):
            if isinstance(weight, Tensor) and weight.numel() == 1:
                weights[i] = weight.item()
            check_number("Fixed", f"weights[{i}]", weights[i], -sys.float_info.max, "a finite number")
        if not isinstance(self.weights, Sequence) or any(isinstance(weight, Tensor) for weight in self.weights):
            # here, once: the steps would wait for a GPU, and what is no list may not be read again
            object.__setattr__(self, "weights", weights)

    def __call__(self, gram: Tensor, losses: Tensor | None = None) -> Tensor:
        """The weights.

        Args:
            gram: [K, K]; only its size and device matter.
            losses: not used.

        Returns:
            [K] float64 on the Gram's device.

        Raises:
            ValueError: there are not K weights.
        """
        K = len(gram)
        if self.weights is None:
            return gram.new_full((K,), 1 / K, dtype=torch.float64)
        if len(self.weights) != K:
            raise ValueError(f"Fixed: weights has {len(self.weights)} numbers for {K} objectives; give one each")
        return filled(self.weights, gram)


def LogSum() -> Fixed:
    """Equal weights on the log-gradients: what the factor 1 / L_i does without any balancing.

    Source: scale-invariant linear scalarization (Nash-MTL, ICML 2022); pi of DTO-KD frozen at 1 / K.
    """
    return Fixed(log_gradients=True)
