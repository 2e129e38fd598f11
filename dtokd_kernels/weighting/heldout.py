"""Weights that lower the task's loss on samples that are not trained on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._arguments import check_number
from ._faces import solve_on_faces
from ._names import check_primary, position_of
from ._units import unit_gram
from .stateful import Memory, Stateful, choose

#: Steps without any measurement after which there is a warning.
PATIENCE = 100


@dataclass(eq=False)
class HeldOut(Stateful):
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
    its second moment), so that the products tell what a step does to the held-out loss.

    What follows from it:

    - A noisy gradient gets a small weight, as it is long and its product with h is not: teachers' soft labels, which
      vary less from batch to batch than hard ones, gain from it.
    - An objective that points away from h on average has weight 0. It is measured on, and comes back if it helps again.
    - The units of the losses do not matter.
    - Where no objective points along h, the primary one has weight 1 and the others 0.

    It looks one step ahead: what pays off only after many steps is not seen. Held-out samples must differ from those of
    the training set as new data would; near copies of training samples measure memorisation.

    Related: adapting auxiliary losses by gradient similarity (Du et al., 2018, arXiv 1812.02224), weights of examples
    by the gradient on clean held-out samples (Ren et al., ICML 2018), online auxiliary weights (Lin et al., NeurIPS
    2019).

    Memory: "gram" [K, K] and "products" [K], decaying sums over the measurements, in units of the primary gradient's
    square; "weights" [K], of the steps until the next measurement.

    Args:
        primary: name or position of the task's objective.
        beta: what the sums keep per measurement, from 0 to below 1.

    Raises:
        TypeError, ValueError: a number outside its range; losses without the primary objective.
    """

    primary: str | int = 0
    beta: float = 0.95
    log_gradients: ClassVar[bool] = False
    needs_gram: ClassVar[bool] = False
    _unmeasured: int | None = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("HeldOut", "beta", self.beta, 0, "from 0 to below 1, such as 0.95", below=1)

    def expect(self, names: tuple[str, ...]) -> None:
        """Take the names of the objectives whose losses come next.

        Raises:
            ValueError: the primary one is not among them, or they are not those of the memory.
        """
        check_primary("HeldOut", self.primary, names)
        super().expect(names)

    def initial(self, gram: Tensor) -> Memory:
        """Nothing measured yet: the primary objective alone."""
        K = len(gram)
        zeros = gram.new_zeros(K, dtype=torch.float64)
        p = position_of("HeldOut", self.primary, self._expected, K) if K > 1 else 0
        weights = torch.where(torch.arange(K, device=gram.device) == p, 1.0, zeros)
        return {"gram": torch.diag(zeros), "products": zeros, "weights": weights}

    def advance(self, memory: Memory, gram: Tensor, losses: Tensor) -> tuple[Tensor, Memory]:
        """The weights of the last measurement."""
        return memory["weights"].clone(), memory

    def commit(self, skipped: Tensor) -> None:
        """Take over what the last call proposed; warn once if many steps were taken without a measurement."""
        super().commit(skipped)
        if self._unmeasured is not None:
            self._unmeasured += 1
        if self._unmeasured == PATIENCE:
            warnings.warn(
                f"HeldOut: no held-out gradient was measured in {PATIENCE} steps, and the primary objective alone was "
                "trained; call measure_held_out(optimizer, losses, held_out_loss) every few steps",
                stacklevel=2,
            )

    @torch.no_grad()
    def observe(self, gram: Tensor, names: Sequence[str] = ()) -> None:
        """Take over a measurement.

        Args:
            gram: [K + 1, K + 1] float64, products of the K gradients of a training batch and, last, of the primary
                loss's gradient on held-out samples. If a number is not finite, or the primary gradient is zero, nothing
                changes.
            names: of the K objectives; default: their positions.

        Raises:
            ValueError: the primary objective is not among them, or they are not those of the memory.

        Effects: no host sync.
        """
        K = len(gram) - 1
        self.expect(tuple(names) or tuple(map(str, range(K))))
        gram = gram.double()
        self(gram[:K, :K], gram[K])  # makes the memory, or checks that it is of K objectives
        assert self._next is not None
        self._memory, _ = self._next
        self._next = None
        self._names = self._expected
        memory = self._memory
        p = position_of("HeldOut", self.primary, self._expected, K)
        unit = gram[p, p]
        new = {
            "gram": self.beta * memory["gram"] + gram[:K, :K] / unit,
            "products": self.beta * memory["products"] + gram[:K, K] / unit,
        }
        new["weights"] = _towards(new["gram"], new["products"], p)
        self._write(choose(~(gram.isfinite().all() & (unit > 0)), memory, new))
        self._unmeasured = None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; from an empty one, start anew.

        Raises:
            ValueError: it is another weighting's state. Nothing has changed then.
        """
        super().load_state_dict(state)
        self._unmeasured = 0 if self._memory is None else None


def _towards(gram: Tensor, products: Tensor, p: int) -> Tensor:
    """Weights [K] of the regression on the gradients, not negative, at the primary gradient's length.

    Args:
        gram: [K, K], products of the gradients.
        products: [K], of the gradients with what they are to come near to.
        p: position of the primary one.
    """
    cosines, norms, inverse = unit_gram(gram)
    right = products * inverse
    x, solvable = solve_on_faces(cosines, right[:, None])
    x = x[:, :, 0]
    gains = (x @ right).where(solvable & (x >= 0).all(1), -torch.inf)
    best = x[gains.argmax(0, keepdim=True)][0]
    square = best @ cosines @ best
    alone = (torch.arange(len(norms), device=norms.device) == p).double()
    return torch.where(square > 0, best * inverse * norms[p] / square.sqrt(), alone)
