"""One of several simple rules, chosen by what it does for samples that are not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._arguments import check_steps
from ._measured import Measured
from .heldout import at_length, regression
from .stateful import Memory

#: What is chosen from, the simplest first, and what it is called in the line on the choice.
RULES = {
    "alone": "the primary objective alone",
    "shares": "equal shares of the gradient's norm",
    "logs": "the sum of the logarithms of the losses",
    "held-out": "the regression of the held-out gradient",
}


@dataclass(eq=False)
class Auto(Measured):
    """Measures for a while, chooses among simple rules by a held-out criterion, and freezes the weights.

    The first half of `window` measurements (`dtokd_kernels.measure_held_out`) makes each candidate's weights, from the
    averages of G_ij = <g_i, g_j>, b_i = <g_i, h> and L_i: the primary objective alone (w_p = 1); equal shares
    (w_i = 1 / norm g_i); the sum of logs (w_i = 1 / L_i); the regression of `HeldOut`. The second half judges them: the
    candidate with the largest <h, d> / ||d||, the fall of the held-out loss for the length of the step, is chosen (of
    two that are equal the simpler one). Its weights, from both halves, are constants from then on, scaled so that
    d is as long as the primary gradient was. `report` returns a line on what was chosen and why. Until then equal
    shares are trained.

    The measurements that make the weights do not judge them; otherwise the rule with the most freedom would win by
    chance. `Auto` does not see that another weight may be right later in training; `HeldOut` does.

    A measurement that is left out, as it is not finite, counts as one of `window`: the host does not read that. Where
    all of a half are left out, the primary objective alone is chosen.

    Memory: "gram" and "later gram" [K, K], "products" and "later products" [K], sums over the halves, in the units
    of `HeldOut`; "losses" [K] and "steps" [K], sums; "gains" [1, 4], of the candidates; "choice", its
    number or -1; "weights" [K].

    Args:
        primary: name or position of the task's objective.
        window: measurements, two at least.

    Raises:
        TypeError, ValueError: a window that is no number of steps from 2; losses without the primary objective.
    """

    primary: str | int = 0
    window: int = 40

    def __post_init__(self) -> None:
        check_steps("Auto", "window", self.window)
        if self.window < 2:
            raise ValueError(f"Auto: window is {self.window}; pass two measurements at least: one judges the other")

    def initial(self, gram: Tensor) -> Memory:
        """Nothing measured yet: the primary objective alone."""
        K = len(gram)
        zeros = gram.new_zeros(K, dtype=torch.float64)
        halves = {"gram": torch.diag(zeros), "products": zeros, "later gram": torch.diag(zeros)}
        sums = {"later products": zeros.clone(), "losses": zeros.clone(), "steps": zeros.clone()}
        chosen = {"gains": zeros.new_zeros(1, len(RULES)), "choice": zeros.new_full((), -1)}
        return {**halves, **sums, **chosen, "weights": self.alone(gram)}

    @property
    def done(self) -> bool:
        """Whether the rule is chosen."""
        return self._measurements >= self.window

    def advance(self, memory: Memory, gram: Tensor, losses: Tensor) -> tuple[Tensor, Memory]:
        """The weights as they are; the losses are averaged until the choice."""
        weights, new = super().advance(memory, gram, losses)
        if not self.done:
            new = {**memory, "losses": memory["losses"] + losses, "steps": memory["steps"] + 1}
        return weights, new

    def learn(self, memory: Memory, gram: Tensor, p: int) -> Memory:
        """Sums after a measurement, and equal shares by those of the first half."""
        K, new = len(gram) - 1, dict(memory)
        half = "" if self._measurements <= self.window // 2 else "later "
        new[half + "gram"] = memory[half + "gram"] + gram[:K, :K]
        new[half + "products"] = memory[half + "products"] + gram[:K, K]
        if not half:
            new["weights"] = _candidates(new["gram"], new["products"], _mean_losses(memory), p)[1]
        return new

    def conclude(self, memory: Memory, p: int) -> Memory:
        """The choice."""
        losses = _mean_losses(memory)
        trained = _candidates(memory["gram"], memory["products"], losses, p)
        squares = ((trained @ memory["later gram"]) * trained).sum(1)
        gains = torch.where(squares > 0, (trained @ memory["later products"]) / squares.sqrt(), 0.0)
        gram, products = (memory[name] + memory["later " + name] for name in ("gram", "products"))
        best = gains.argmax(0, keepdim=True)
        weights = _candidates(gram, products, losses, p)[best][0]
        return {"weights": weights, "gains": gains[None], "choice": best[0].double()}

    def report(self) -> str | None:
        """What was chosen and why, in a line; None before there is a choice. It reads the memory, so it waits."""
        if self._memory is None or self._memory["choice"] < 0:
            return None
        gains, choice = self._memory["gains"][0].tolist(), int(self._memory["choice"])
        names = self._names or tuple(map(str, range(len(self._memory["weights"]))))
        weights = ", ".join(f"{n} {w:.3g}" for n, w in zip(names, self._memory["weights"].tolist(), strict=True))
        others = "; ".join(f"{text} {g:.3g}" for (_, text), g in zip(RULES.items(), gains, strict=True))
        return (
            f"auto: {list(RULES.values())[choice]} ({weights}), for which the held-out loss falls fastest for the "
            f"length of the step: {others}"
        )


def _mean_losses(memory: Memory) -> Tensor:
    """Averages [K] over the steps."""
    return memory["losses"] / memory["steps"].clamp(min=1)


def _candidates(gram: Tensor, products: Tensor, losses: Tensor, p: int) -> Tensor:
    """Weights [4, K] of the `RULES`, each at the primary gradient's length."""
    alone = (torch.arange(len(gram), device=gram.device) == p).double()
    squares = gram.diagonal()
    shares = torch.where(squares > 0, squares.rsqrt(), 0.0)
    logs = torch.where((squares > 0) & (losses > 0), 1 / losses, 0.0)
    weights = (alone, shares, logs, regression(gram, products))
    return torch.stack([at_length(w, gram, p) for w in weights])
