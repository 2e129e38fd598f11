"""DTO-KD's rule on what each loss can still gain: where a loss's minimum is not 0, and with a preference."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import reference
from ._arguments import check_number, filled
from ._names import ordered
from .stateful import Memory, Stateful

#: Averages of the losses whose difference estimates the gain: sample s of t counts in proportion to s ** POWERS[k].
POWERS = (0, 8)
#: The least gain that is estimated, as a share of the loss; and the steps before there is an estimate.
LEAST, START = 1e-3, 10


@dataclass(eq=False)
class Reachable(Stateful):
    """Min-norm weights of the gradients of log(L_i - m_i), with m_i the smallest value that loss i can reach.

    `DTO` weighs g_i / L_i, which takes 0 for the smallest value of each loss. A loss that cannot come near 0 (features
    that a small student cannot represent, cross-entropy with smoothed labels) then seems to have a short gradient for
    ever, and the shortest combination is that gradient almost alone. With gains a_i = L_i - m_i,

        pi = argmin over the simplex of || sum_i pi_i g_i / (p_i a_i) ||,   d = sum_i pi_i / (p_i a_i) g_i,

    where p is the preference, scaled to a mean of 1. What it guarantees: no loss goes up to first order, and where all
    weights are positive the remaining gain of loss i falls at a rate in proportion to p_i (<g_i, d> / a_i = c p_i).

    `loss_min` gives m. Without it the gain is estimated while training, from how much the loss has fallen of late: the
    difference between the mean of the losses of all steps and their mean with weights s^8, which is about that of the
    last ninth. For losses that fall as m + c t^-q it is in proportion to L - m. When it is wrong: it sees what has been
    gained, not what could be. A learning rate that drops makes losses fall that seemed to have reached their minimum; a
    loss that rises has the least gain that is assumed, a thousandth of it; and objectives with different q are measured
    differently, by a factor of 2 to 3 between q = 0.5 and 1. In the first ten steps the gain is the loss itself, as in
    `DTO`.

    Source: DTO-KD (ICLR 2026), Eq. 8-12, for the gradients of log(L_i - m_i). The estimate is this package's.

    Memory: "means" [K] and "recent" [K], the two averages; "steps" [K], how many each has seen.

    Args:
        loss_min: the smallest value of each loss, a list or a dict from names; None to estimate what can be gained.
        preference: how fast each loss is to fall, a list or a dict from names; None for all alike.

    Raises:
        TypeError, ValueError: numbers that are not finite, a preference that is not positive; not one for each
            objective, or names that are not those of the losses.
    """

    loss_min: Sequence[float] | Mapping[str, float] | None = None
    preference: Sequence[float] | Mapping[str, float] | None = None
    log_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.loss_min is not None:
            for name, value in _items("loss_min", self.loss_min):
                check_number("Reachable", f"loss_min[{name!r}]", value, -sys.float_info.max, "a finite number")
        if self.preference is not None:
            for name, value in _items("preference", self.preference):
                check_number("Reachable", f"preference[{name!r}]", value, sys.float_info.min, "a positive number")

    def expect(self, names: tuple[str, ...]) -> None:
        """Take the names of the objectives whose losses come next.

        Raises:
            ValueError: they are not those of `loss_min` and `preference`, or not those of the memory.
        """
        for argument, values in (("loss_min", self.loss_min), ("preference", self.preference)):
            if values is not None:
                ordered("Reachable", argument, values, names, len(names))
        super().expect(names)

    def initial(self, gram: Tensor) -> Memory:
        """Nothing averaged yet."""
        return {name: gram.new_zeros(len(gram), dtype=torch.float64) for name in ("means", "recent", "steps")}

    def advance(self, memory: Memory, gram: Tensor, losses: Tensor) -> tuple[Tensor, Memory]:
        """The weights and the memory after them."""
        K, new = len(gram), dict(memory)
        present = gram.diagonal() > 0
        new["steps"] = torch.where(present, memory["steps"] + 1, memory["steps"])
        for name, power in zip(("means", "recent"), POWERS, strict=True):
            part = (1 + power) / (new["steps"] + power)
            new[name] = torch.where(present, memory[name] + part * (losses - memory[name]), memory[name])
        if self.loss_min is None:
            fallen = torch.maximum(new["means"] - new["recent"], LEAST * losses.abs())
            gains = torch.where(new["steps"] > START, fallen, losses)
        else:
            gains = losses - self._of("loss_min", self.loss_min, gram)
        if self.preference is not None:
            preference = self._of("preference", self.preference, gram)
            gains = gains * (preference * K / preference.sum())
        # a loss that is at its minimum, or below it, has nothing to gain: its gradient is left out
        present = present & (gains > 0)
        scale = torch.where(present, 1 / gains, 0.0)
        return reference.min_norm_weights(scale[:, None] * gram * scale, True, present) * scale, new

    def _of(self, argument: str, values: Sequence[float] | Mapping[str, float], gram: Tensor) -> Tensor:
        return filled(ordered("Reachable", argument, values, self._expected, len(gram)), gram)


def _items(argument: str, values: Sequence[float] | Mapping[str, float]) -> Iterable[tuple[object, object]]:
    if isinstance(values, Mapping):
        return values.items()
    if isinstance(values, (str, Tensor)) or not isinstance(values, Sequence):
        raise TypeError(
            f"Reachable: {argument} is {values!r}; pass a list of numbers, one for each objective, or a dict from names"
        )
    return enumerate(values)
