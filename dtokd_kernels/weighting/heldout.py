"""Weights that lower the task's loss on samples that are not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference import EQUAL
from ._arguments import check_number
from ._faces import minimum_from_0
from ._measured import Measured
from ._units import in_any_order, unit_gram
from .stateful import Memory


@dataclass(eq=False)
class HeldOut(Measured):
    """The combination of the gradients that comes nearest to the task's gradient on held-out samples.

    Training lowers the loss on the samples of a batch; what counts is the loss on samples that are not trained on. Now
    and then their gradient h of the primary (task) loss is measured, together with the K gradients g_i of a training
    batch (`dtokd_kernels.measure_held_out`). With the averages over the measurements of G_ij = <g_i, g_j> and
    b_i = <g_i, h>, the weights are those of the regression of h on the g_i,

        w = argmin_{w >= 0}  w^T G w / 2 - b^T w,

    which is the convex problem whose solution points where the held-out loss falls fastest for the length of the step:
    it maximises <h, d> / ||d|| on average. Between measurements they are constants, so that a step takes one backward
    pass of the weighted sum. They are scaled so that d is as long as the primary gradient was: a learning rate that
    was tuned for the task alone keeps its meaning.

    The inner product is that of the optimizer's metric where it has one (AdamW divides each direction by the root of
    its second moment), so that the products show what a step does to the held-out loss.

    What follows from it:

    - A noisy gradient gets a small weight, as it is long and its product with h is not: teachers' soft labels, which
      vary less from batch to batch than hard ones, gain from it.
    - An objective that points away from h on average has weight 0, unless it takes away what others have across h. It
      is still measured, and has weight again when it helps.
    - The units of the losses do not matter.
    - Where no objective points along h, the primary one has weight 1 and the others 0.

    It looks one step ahead, and does not see what pays off only after many steps. Held-out samples must differ from
    those of the training set as new data would; near copies of training samples measure memorisation.

    Related: adapting auxiliary losses by gradient similarity (Du et al., 2018, arXiv 1812.02224), weights of examples
    by the gradient on clean held-out samples (Ren et al., ICML 2018), online auxiliary weights (Lin et al., NeurIPS
    2019).

    Memory: "gram" [K, K] and "products" [K], decaying sums over the measurements, each in units of the larger of
    ||g_p||^2 and ||h||^2; "weights" [K], of the steps until the next measurement.

    Args:
        primary: name or position of the task's objective.
        beta: part of the sums that stays in each measurement, from 0 to below 1.

    Raises:
        TypeError, ValueError: a number outside its range; losses without the primary objective.
    """

    primary: str | int = 0
    beta: float = 0.95

    def __post_init__(self) -> None:
        check_number("HeldOut", "beta", self.beta, 0, "from 0 to below 1, such as 0.95", below=1)

    def initial(self, gram: Tensor) -> Memory:
        """Nothing measured yet: the primary objective alone."""
        zeros = gram.new_zeros(len(gram), dtype=torch.float64)
        return {"gram": torch.diag(zeros), "products": zeros, "weights": self.alone(gram)}

    def learn(self, memory: Memory, gram: Tensor, p: int) -> Memory:
        """Sums and weights after a measurement."""
        K = len(gram) - 1
        sums = self.beta * memory["gram"] + gram[:K, :K]
        products = self.beta * memory["products"] + gram[:K, K]
        return {"gram": sums, "products": products, "weights": at_length(regression(sums, products), sums, p)}


def regression(gram: Tensor, products: Tensor) -> Tensor:
    """Weights [K] >= 0 of the combination of the gradients that comes nearest to a vector.

    Args:
        gram: [K, K], products of the gradients.
        products: [K], of the gradients with the vector.
    """
    return in_any_order(_regression, gram, products)


def _regression(gram: Tensor, products: Tensor) -> Tensor:
    cosines, _, inverse = unit_gram(gram)
    return minimum_from_0(cosines, products * inverse) * inverse


def at_length(weights: Tensor, gram: Tensor, p: int) -> Tensor:
    """The weights [K] of the same direction, as long as the gradient at position p; where it is 0, that alone.

    A sum that cancels to rounding has no direction, and counts as 0.
    """
    square = weights @ gram @ weights
    parts = weights.abs() @ gram.diagonal().sqrt()
    alone = (torch.arange(len(weights), device=weights.device) == p).double()
    return torch.where(square > EQUAL * parts.square(), weights * (gram[p, p] / square).sqrt(), alone)
