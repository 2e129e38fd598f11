"""A primary objective that the others may help, and not push aside."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..reference import EQUAL
from ._arguments import check_number, check_steps
from ._faces import minimum_from_0
from ._names import check_primary, position_of
from ._units import in_any_order, unit_gram
from .stateful import Memory, Stateful

#: A constraint counts as met up to this share of the longest normalised gradient.
MET = 1e-9


@dataclass(eq=False)
class TaskFirst(Stateful):
    """The primary objective's gradient, and those of the others where they do not work against it.

    `rule="cosine"`: d = g_p + sum_j r g_j over the objectives j whose gradient does not point against the primary
    one's, <g_j, g_p> >= 0. What it guarantees: <g_p, d> >= ||g_p||^2, so to first order the primary loss falls at least
    as fast as without the others. (Source: Du et al., "Adapting Auxiliary Losses Using Gradient Similarity", 2018, the
    unweighted form.)

    `rule="pcd"`: the direction nearest to the primary gradient in which each other objective makes a share `tau` of the
    progress that its own gradient would give it:

        d' = argmin 1/2 ||d - g'_p||^2  subject to  <g'_j, d> >= tau ||g'_j||^2,   d = d' ||g_p|| / ||d'||,

    with g'_i = g_i / sqrt(average of ||g_i||^2 over the steps). What it guarantees: that share for each other
    objective, and the length of the primary gradient. (Not that the primary loss falls: against an opposite gradient
    the share is kept.) Where the constraints exclude each other (K >= 3) they are dropped. Where all cosines with the
    primary gradient are above tau, d is the primary gradient alone: choose tau near 1 for a mixture.
    (Source: priority-constrained descent, TMLR 2026, arXiv 2606.29521.)

    `patience`: an objective whose cosine with the primary one, averaged over the steps, has been negative in this many
    steps in a row is left out from then on: it has stopped helping. HASTE (NeurIPS 2025) stops at a fixed iteration.

    If the primary gradient is zero, d is zero.

    Memory: "squares" [K] and "cosines" [K], sums over the steps, and "counts" [K], what they are divided by; "against"
    [K], for how many steps the averaged cosine has been negative, and "closed" [K], 1 for objectives that are left out.

    Args:
        primary: name or position of the primary objective.
        rule: "cosine" or "pcd".
        ratio: r, the factor of the other gradients, for "cosine".
        tau: for "pcd", from 0 to 1.
        beta: part of the averages that stays in each step, from 0 to below 1.
        patience: steps; None for never.
        log_gradients: take the gradients of log L_i instead of those of L_i.

    Raises:
        TypeError, ValueError: no such rule; a number outside its range; losses without the primary objective.
    """

    primary: str | int = 0
    rule: Literal["cosine", "pcd"] = "cosine"
    ratio: float = 1.0
    tau: float = 0.02
    beta: float = 0.999
    patience: int | None = None
    log_gradients: bool = False

    def __post_init__(self) -> None:
        if self.rule not in ("cosine", "pcd"):
            raise ValueError(f"TaskFirst: rule is {self.rule!r}; choose 'cosine' or 'pcd'")
        check_number("TaskFirst", "ratio", self.ratio, 0, "that is not negative, such as 1.0")
        check_number("TaskFirst", "tau", self.tau, 0, "from 0 to 1", below=math.nextafter(1, 2))
        check_number("TaskFirst", "beta", self.beta, 0, "from 0 to below 1, such as 0.999", below=1)
        if self.patience is not None:
            check_steps("TaskFirst", "patience", self.patience)

    def expect(self, names: tuple[str, ...]) -> None:
        """Take the names of the objectives whose losses come next.

        Raises:
            ValueError: the primary one is not among them, or they are not those of the memory.
        """
        check_primary("TaskFirst", self.primary, names)
        super().expect(names)

    def initial(self, gram: Tensor) -> Memory:
        """Nothing averaged yet."""
        return {name: gram.new_zeros(len(gram), dtype=torch.float64) for name in _MEMORY}

    def advance(self, memory: Memory, gram: Tensor, losses: Tensor) -> tuple[Tensor, Memory]:
        """The weights and the memory after them."""
        p = position_of("TaskFirst", self.primary, self._expected, len(gram))
        cosines, norms, inverse = unit_gram(gram)
        towards = cosines[p]
        present = norms > 0
        counts = torch.where(present, self.beta * memory["counts"] + 1, memory["counts"])
        new = {"counts": counts}
        for name, value in (("squares", norms.square()), ("cosines", towards)):
            new[name] = torch.where(present, self.beta * memory[name] + value, memory[name])
        average = new["cosines"] / counts.clamp(min=1)
        new["against"] = torch.where(present, torch.where(average < 0, memory["against"] + 1, 0.0), memory["against"])
        new["closed"] = memory["closed"]
        if self.patience is not None:
            new["closed"] = torch.where(new["against"] >= self.patience, 1.0, new["closed"])
        is_primary = torch.arange(len(gram), device=gram.device) == p
        used = present & present[p] & ((new["closed"] == 0) | is_primary)
        if self.rule == "cosine":
            weights = torch.where(is_primary, torch.ones_like(norms), self.ratio)
            return torch.where(used & (towards >= 0), weights, 0.0), new
        scales = torch.where(new["squares"] > 0, (counts / new["squares"]).sqrt(), 0.0)
        return _constrained(cosines, scales * norms, inverse * norms[p], self.tau, p, used), new


def _constrained(cosines: Tensor, lengths: Tensor, inverse: Tensor, tau: float, p: int, used: Tensor) -> Tensor:
    """Weights [K] of priority-constrained descent.

    Args:
        cosines: [K, K] of the gradients.
        lengths: [K], norms of the normalised gradients g'.
        inverse: [K], the primary gradient's norm over each gradient's.
        tau: share of progress.
        p: position of the primary one.
        used: [K] bool.
    """
    is_primary = torch.arange(len(lengths), device=lengths.device) == p
    others = used & ~is_primary
    C = torch.where(others[:, None] & others, cosines, 0.0)
    # d' = l_p u_p + sum_j x_j u_j with x >= 0; where x_j > 0 the constraint of j is met exactly
    missing = torch.where(others, tau * lengths - cosines[p] * lengths[p], 0.0)
    best = in_any_order(minimum_from_0, C, missing)
    met = (C @ best >= missing - MET * lengths.amax()).all()
    units = torch.where(is_primary & used, lengths, torch.where(met, best, 0.0))
    square = units @ cosines @ units
    # a sum that cancels to rounding has no direction
    length = torch.where(square > EQUAL * units.sum().square(), square.sqrt(), torch.inf)
    return units * inverse / length


_MEMORY = ("squares", "cosines", "counts", "against", "closed")
