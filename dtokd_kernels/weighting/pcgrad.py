"""PCGrad: each gradient without the parts that point against another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _random
from ._arguments import check_seed
from .stateful import Memory, Stateful


@dataclass(eq=False)
class PCGrad(Stateful):
    """The sum of the K gradients, each projected onto the normal planes of those it conflicts with, in random order.

    For K = 2 the order doesn't matter.

    Source: gradient surgery, Yu et al. (NeurIPS 2020), Algorithm 1, on the Gram matrix: the weights [K, K] of the
    projected gradients start as the identity, and where the projected g_i has <g_i, g_j> < 0, weight j of row i loses
    <g_i, g_j> / ||g_j||^2.

    Memory: "step", which with the seed decides the orders: the same on all devices and ranks.

    Args:
        seed: seed of the random orders.
        log_gradients: project the gradients of log L_i instead of those of L_i (published).
    """

    seed: int = 0
    log_gradients: bool = False

    def __post_init__(self) -> None:
        check_seed("PCGrad", self.seed)

    def initial(self, gram: Tensor) -> Memory:
        """No order drawn yet."""
        return {"step": gram.new_zeros((), dtype=torch.int64)}

    def advance(self, memory: Memory, gram: Tensor, losses: Tensor) -> tuple[Tensor, Memory]:
        """The weights and the memory after them."""
        return pcgrad_weights(gram, memory["step"], self.seed), {"step": memory["step"] + 1}


def pcgrad_weights(gram: Tensor, step: Tensor, seed: int) -> Tensor:
    """Weights [K] of a Gram matrix [K, K] float64.

    Args:
        gram: [K, K] float64.
        step: scalar int64; with the seed it decides the orders.
        seed: any integer.
    """
    K = len(gram)
    everyone = torch.arange(K, device=gram.device)
    squares = gram.diagonal()
    inverse = torch.where(squares > 0, 1 / squares, 0.0)
    rows = torch.eye(K, dtype=torch.float64, device=gram.device)
    for partners in orders(seed, step, K).unbind(1):
        product = (gram[partners] * rows).sum(1)  # [K], <the projected g_i, g_partner>
        conflict = (product < 0) & (partners != everyone)
        subtracted = torch.where(conflict, product * inverse[partners], 0.0)
        rows = rows - subtracted[:, None] * (partners[:, None] == everyone)
    return rows.sum(0)


def orders(seed: int, step: Tensor, K: int) -> Tensor:
    """[K, K] int64: in which order row i meets the objectives (itself among them, which changes nothing)."""
    return _random.uniform(seed, step, K * K).view(K, K).argsort(1)
