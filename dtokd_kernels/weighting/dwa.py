"""Dynamic weight average: what falls slowly gets more weight."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._arguments import check_number
from .stateful import Memory, Stateful

#: The smallest positive float64 that is not rounded more than others.
SMALLEST = sys.float_info.min


@dataclass(eq=False)
class DWA(Stateful):
    """Softmax of the ratio of each loss to what it was: weights K softmax(r / T) with r_i = L_i(t-1) / L_i(t-2).

    t counts periods, and L_i(t) is the mean of a period's losses. For two periods all weights are 1; they sum to K.
    Where there is no finite ratio, as that of a loss whose mean was 0 (an objective that is not switched on yet), r_i
    is 1.

    Source: Liu, Johns and Davison (CVPR 2019), dynamic weight average.

    Memory: "total" and "count" of the running period, "older" and "newer" means, "periods". Needs no Gram matrix.

    Args:
        period: steps that are averaged; an epoch in the paper.
        temperature: T; larger is closer to equal weights.

    Raises:
        ValueError: a period that is no positive integer, or a temperature that is not positive.
    """

    period: int = 1000
    temperature: float = 2.0
    log_gradients: ClassVar[bool] = False
    needs_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.period, int) or isinstance(self.period, bool) or self.period < 1:
            raise ValueError(f"DWA: period is {self.period!r}; pass a number of steps, such as those of an epoch")
        check_number("DWA", "temperature", self.temperature, SMALLEST, "a positive number, such as 2.0")

    def initial(self, gram: Tensor) -> Memory:
        """Nothing seen yet."""
        ones = gram.new_ones(len(gram), dtype=torch.float64)
        counter = gram.new_zeros((), dtype=torch.int64)
        return {
            "total": torch.zeros_like(ones),
            "count": counter,
            "older": ones,
            "newer": ones.clone(),
            "periods": counter.clone(),
        }

    def advance(self, memory: Memory, gram: Tensor, losses: Tensor) -> tuple[Tensor, Memory]:
        """The weights and the memory after them."""
        rates = memory["newer"] / memory["older"]
        rates = torch.where((memory["periods"] >= 2) & rates.isfinite(), rates, 1.0)
        weights = len(gram) * (rates / self.temperature).softmax(0)
        total, count = memory["total"] + losses, memory["count"] + 1
        over = count == self.period
        return weights, {
            "total": total.where(~over, 0.0),
            "count": count.where(~over, 0),
            "older": memory["newer"].where(over, memory["older"]),
            "newer": (total / self.period).where(over, memory["newer"]),
            "periods": memory["periods"] + over,
        }
