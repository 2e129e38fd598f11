"""Uncertainty weighting: each objective's noise is learned, and divides it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import _learned
from .stateful import Memory, Stateful


@dataclass(eq=False)
class UncertaintyWeighting(Stateful):
    """Minimises sum_i L_i / (2 sigma_i^2) + log sigma_i also over s_i = log sigma_i^2, which AdamW learns.

    The weights are exp(-s_i) / 2. Where s has settled they are 1 / (2 L_i): as `LogSum`, but averaged over time.

    Source: Kendall, Gal and Cipolla (CVPR 2018), Eq. 7, learning log sigma_i^2 as they do. (For a cross-entropy their
    Eq. 10 has L_i / sigma_i^2: twice the loss, which s comes to make up for.)

    Memory: "learned" (s) and AdamW's state. Needs no Gram matrix.

    Args:
        lr: learning rate of s, in the paper that of the network; they take their own steps here.
        weight_decay: decoupled; 0, as a decay of s pulls all the weights to 1 / 2.

    Raises:
        ValueError: a negative learning rate or weight decay.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    log_gradients: ClassVar[bool] = False
    needs_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _learned.check("UncertaintyWeighting", self.lr, self.weight_decay)

    def initial(self, gram: Tensor) -> Memory:
        """All sigma_i = 1."""
        return _learned.start(gram.new_zeros(len(gram), dtype=torch.float64))

    def advance(self, memory: Memory, gram: Tensor, losses: Tensor) -> tuple[Tensor, Memory]:
        """The weights and the memory after them."""
        weights = (-memory["learned"]).exp() / 2
        gradient = 0.5 - weights * losses
        return weights, _learned.descend(memory, gradient, lr=self.lr, weight_decay=self.weight_decay)
