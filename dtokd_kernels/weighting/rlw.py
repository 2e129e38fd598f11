"""Random weights: the baseline that every rule should beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import _random
from ._arguments import check_seed
from .stateful import Memory, Stateful


@dataclass(eq=False)
class RLW(Stateful):
    """Softmax of K standard normal numbers, drawn anew each step.

    Source: random loss weighting, Lin, Ye, Zhang and Tsang (TMLR 2022), with the normal distribution.

    Memory: "step", which with the seed decides what is drawn: the same on all devices and ranks. Needs no Gram matrix.

    Args:
        seed: seed of the random numbers.
        log_gradients: weigh the gradients of log L_i instead of those of L_i (published).
    """

    seed: int = 0
    log_gradients: bool = False
    needs_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_seed("RLW", self.seed)

    def initial(self, gram: Tensor) -> Memory:
        """Nothing drawn yet."""
        return {"step": gram.new_zeros((), dtype=torch.int64)}

    def advance(self, memory: Memory, gram: Tensor, losses: Tensor) -> tuple[Tensor, Memory]:
        """The weights and the memory after them."""
        normal = torch.special.ndtri(_random.uniform(self.seed, memory["step"], len(gram)))
        return normal.softmax(0), {"step": memory["step"] + 1}
