"""DTO-KD's amortized rule: weights that are learned from step to step instead of solved for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from . import _learned
from .stateful import Memory, Stateful, choose

READINGS = ("famo", "gram", "eq18")


@dataclass(eq=False)
class Amortized(Stateful):
    """Softmax of logits w that take one step of AdamW per step of the student.

    The student descends sum_i pi_i log L_i with pi = softmax(w) (Algorithm 1). What w descends comes in three readings;
    with s the slope in pi, the slope in w is (diag(pi) - pi pi^T) s:

    - "famo": s_i = log L_i(t) - log L_i(t+1), how fast objective i fell (Eq. 6), so that what falls fastest loses
      weight. L(t+1) are the losses that `observe` is given, or else those of the next batch, which cost nothing and
      are noisier. No constant factor of a loss matters. Needs no Gram matrix, so one backward pass is enough.
    - "gram": s = G pi, the slope of 1/2 ||sum_i pi_i grad log L_i||^2: the first-order rates, without noise. For a
      Gram matrix that stays, the weights converge to those of `DTO` (up to weight decay).
    - "eq18": s_i = (sum_j pi_j log L_j) log L_i, the slope of 1/2 (sum_i pi_i log L_i)^2 as printed. Not invariant to
      the losses' units: its sign turns where that of sum_j pi_j log L_j does, and its fixed points are no Pareto
      condition. Needs no Gram matrix.

    A loss that falls to nearly 0 without help to the task takes the whole step: its log-gradient grows like 1 / L, pi
    stays near 1 / K. With a teacher whose outputs are trivial the student learns nothing else (docs/evidence.md).

    Source: DTO-KD (ICLR 2026), Algorithm 1, Eq. 6 and 18; FAMO (Liu et al., NeurIPS 2023), Algorithm 1, which divides
    the coefficients by their sum (`rescale="sum"` of the optimizers) and whose code uses Adam with coupled decay.

    Memory: "learned" (w), AdamW's state; for "famo" also "log_losses" [K] (-inf where there was no gradient) and
    "pending", whether the losses after that step are still to come. On several ranks give `observe` averaged losses;
    `backward` averages its own.

    Args:
        reading: the slope that the logits follow, "famo", "gram" or "eq18".
        lr: learning rate of the logits.
        weight_decay: decoupled; pulls the weights towards 1 / K.

    Raises:
        ValueError: an unknown reading, a negative learning rate or weight decay.
    """

    reading: Literal["famo", "gram", "eq18"] = "famo"
    lr: float = 0.025
    weight_decay: float = 0.01
    log_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise ValueError(f"Amortized: reading is {self.reading!r}; choose 'famo', 'gram' or 'eq18'")
        _learned.check("Amortized", self.lr, self.weight_decay)

    @property
    def rule(self) -> str:
        """Readings remember different things."""
        return f"Amortized {self.reading}"

    @property
    def needs_gram(self) -> bool:
        """Whether the weights depend on the Gram matrix."""
        return self.reading == "gram"

    def initial(self, gram: Tensor) -> Memory:
        """Equal weights."""
        zeros = gram.new_zeros(len(gram), dtype=torch.float64)
        memory = _learned.start(zeros)
        if self.reading == "famo":
            memory["log_losses"] = zeros.clone()
            memory["pending"] = zeros.new_zeros((), dtype=torch.bool)
        return memory

    def advance(self, memory: Memory, gram: Tensor, losses: Tensor) -> tuple[Tensor, Memory]:
        """The weights and the memory after them."""
        # an objective without a gradient is out of the simplex, as in DTO, and learns nothing
        present = gram.diagonal() != 0
        logs = losses.log()
        if self.reading == "famo":
            memory = choose(~memory["pending"], memory, self._compare(memory, logs))
            new = {"log_losses": logs.where(present, -torch.inf), "pending": torch.ones_like(memory["pending"])}
            return _softmax(memory, present), {**memory, **new}
        weights = _softmax(memory, present)
        if self.reading == "gram":
            return weights, self._descend(memory, gram @ weights, weights)
        return weights, self._descend(memory, (weights @ logs) * logs, weights)

    @torch.no_grad()
    def observe(self, losses: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> None:
        """Take the losses of the last step's batch again, with the parameters after the step.

        Evaluate without gradient, in the objectives' order, and so that the second evaluation differs from the first
        by the parameters alone: without updating BatchNorm's statistics (set `momentum` to 0 meanwhile) and with the
        same dropout and drop path (restore the random state, or have none).

        Args:
            losses: [K], or K scalars, or those by name. If one is not finite and positive nothing changes.

        Raises:
            RuntimeError: the reading is not "famo", or there was no step before.
            TypeError: `losses` holds something else than numbers.
            ValueError: there are not K losses, or their names are others.

        Effects: no host sync. After a skipped step, or a second time for one step, nothing changes.
        """
        if self.reading != "famo":
            raise RuntimeError(f"Amortized.observe: reading {self.reading!r} uses no later losses; leave the call out")
        if self._memory is None:
            raise RuntimeError("Amortized.observe: there was no step yet; call it after optimizer.step()")
        memory = self._memory
        before = memory["log_losses"]
        if isinstance(losses, Mapping):
            named = {str(name): loss for name, loss in losses.items()}
            if named.keys() != set(self._names):
                raise ValueError(f"Amortized.observe: losses are {list(named)}, expected {list(self._names)}")
            losses = [named[name] for name in self._names]
        if not isinstance(losses, Tensor):
            try:
                losses = torch.stack([torch.as_tensor(loss).reshape(()) for loss in losses])
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"Amortized.observe: losses is {losses!r}; pass one number for each objective, in a list, a tensor "
                    "or a dict from names"
                ) from error
        if losses.shape != before.shape:
            raise ValueError(
                f"Amortized.observe: losses has shape {tuple(losses.shape)}, expected {tuple(before.shape)}: "
                "one per objective, in the order that backward got them"
            )
        after = losses.to(before).log()
        usable = memory["pending"] & after.isfinite().all()
        new = {**self._compare(memory, after), "pending": torch.zeros_like(usable)}
        self._write(choose(~usable, memory, new))

    def _compare(self, memory: Memory, logs: Tensor) -> Memory:
        """Learn what has come of the losses that are remembered; those of absent objectives are -inf."""
        present = memory["log_losses"] > -torch.inf
        return self._descend(memory, (memory["log_losses"] - logs).where(present, 0.0), _softmax(memory, present))

    def _descend(self, memory: Memory, slope: Tensor, weights: Tensor) -> Memory:
        gradient = weights * (slope - weights @ slope)
        return _learned.descend(memory, gradient, lr=self.lr, weight_decay=self.weight_decay)


def _softmax(memory: Memory, present: Tensor) -> Tensor:
    """The weights among the objectives that are present ([K] bool)."""
    return memory["learned"].where(present, -torch.inf).softmax(0)
