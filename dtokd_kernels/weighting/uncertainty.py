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
    """Minimises sum_i L_i / (2 sigma_i^2) + log sigma_i over s_i = log sigma_i^2 too, which take a step of AdamW each step.

    The weights are exp(-s_i) / 2; where s has settled they are 1 / (2 L_i): the same as `LogSum`, in the long run.

    Source: Kendall, Gal and Cipolla (CVPR 2018), Eq. 7, with s learned as their section 3.3 says. (For a cross-entropy
    their Eq. 10 has L_i / sigma_i^2: twice the loss, which shifts s and changes nothing else.)

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
