"""Weights from the step before, so that one pass over memory takes this step's Gram matrix and updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..plan import Step
from ..reach import Reach
from ..rows import Layout
from ..types import Balance, Options, Role
from ..watch import Watch
from .buckets import Buckets
from .source import Gathered, Source, remember


@dataclass(eq=False)
class Lag(Source):
    """K backward passes; then the weights pi of the previous step's Gram matrix, on this step's gradients and losses.

    `step` reads the gradients once: the pass that updates also takes the products that the next step weighs. The
    first step, and one with other objectives than before, is exact.

    Cost: K backward passes; `step` is one pass over memory. As that pass cannot know what it will meet, each
    gradient is checked for NaN and Inf when autograd writes it, while it is in cache: a step with such a gradient
    changes nothing, as always, and an objective without any is left out. Weights: one step old; an objective that had
    no shared gradient in that step is weighed by its length in this one, as if at right angles to the others.
    `max_norm` clips by the norm that the previous Gram matrix gives these weights; `balance.norm`, `gram` and `cosine`
    are this step's.
    """

    _names: tuple[str, ...] = field(default=(), init=False, repr=False)
    _kept: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)  # grams [3, K, K], losses [K]
    _next: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    _weights: Tensor | None = field(default=None, init=False, repr=False)  # this step's, unless it is exact
    _scale: Tensor | None = field(default=None, init=False, repr=False)  # of this step's gradients

    @property
    def measures_in_step(self) -> bool:
        """The products are taken by the update in `step`."""
        return True

    def begin(self) -> Source:
        """The same choice, before its first step."""
        return Lag()

    def watch(self, options: Options) -> Watch | None:
        """Looks for gradients that are not finite."""
        return _Finite(options)

    def solve(self, gathered: Gathered, options: Options) -> Balance:
        """The balance as the previous step's Gram matrices give it."""
        losses, first = gathered.losses, self._kept is None or gathered.names != self._names
        self._scale = gathered.scale
        grams = kernels.gram(gathered.rows, len(losses), options.backend, losses.device) if first else None
        if grams is not None:
            grams = kernels.unscaled(grams, self._scale)
            self._next, self._weights = (grams, losses), None
            return kernels.balance(grams, losses, options)
        assert self._kept is not None
        assert isinstance(gathered.watch, _Finite)
        squares = kernels.unscaled(gathered.watch.squares().to(losses.device), self._scale)
        before, losses_before = (kept.to(losses.device) for kept in self._kept)
        known = before.clone()
        lengths = known[Role.SHARED].diagonal()
        present = lengths != 0
        # of objectives without a shared gradient in that step nothing is known but this step's squares
        torch.where(present, lengths, _of_shared(squares, gathered.rows.layout), out=lengths)
        losses_before = torch.where(present, losses_before, losses)
        roles = gathered.rows.layout.roles
        record = kernels.balance_before(known, losses_before, losses, squares, roles, options)
        self._weights, self._next = record.weights, (before, losses)
        if record.skipped.device.type == "cpu" and record.skipped:  # known on the host: no update follows
            grams = kernels.unscaled(
                kernels.gram(gathered.rows, len(losses), options.backend, losses.device), self._scale
            )
            return self._measured(grams, losses, record, record.skipped, options)
        return record

    def run(self, step: Step, balance: Balance, coefficients: Tensor) -> Balance:
        """Update and measure in one pass; the first step has measured already."""
        if self._weights is None:
            return super().run(step, balance, coefficients)
        assert self._next is not None
        grams, skipped = step.measure_and_update(coefficients, balance.skipped)
        grams, losses = kernels.unscaled(grams, self._scale), self._next[1]
        self._next = grams, losses
        return self._measured(grams, losses, balance, skipped, step.options)

    def _measured(self, grams: Tensor, losses: Tensor, balance: Balance, skipped: Tensor, options: Options) -> Balance:
        """The balance that the step was taken, or skipped, with, and what was measured in it."""
        unclipped = options if options.max_norm is None else replace(options, max_norm=None)
        record = kernels.balance(grams, losses, unclipped, self._weights)
        return replace(record, weights=balance.weights, table=balance.table, skipped=skipped)

    def commit(self, names: tuple[str, ...], balance: Balance) -> None:
        """Keep this step's Gram matrices for the next."""
        assert self._next is not None
        grams, losses = self._next
        if self._kept is None or names != self._names:
            # if the first step is skipped the next one weighs all alike
            alike = torch.zeros_like(grams)
            alike[Role.SHARED].fill_diagonal_(1.0)
            self._kept = alike, torch.ones_like(losses)
        before, losses_before = self._kept
        self._kept = remember(before, grams, balance.skipped), remember(losses_before, losses, balance.skipped)
        self._names = names

    def state_dict(self) -> dict[str, Any]:
        """The last Gram matrices [3, K, K], one for each `Role`, with their losses."""
        if self._kept is None:
            return {}
        return {"grams": self._kept[0].clone(), "losses": self._kept[1].clone(), "names": list(self._names)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from these Gram matrices, or with an exact step."""
        fits = state.keys() >= {"grams", "losses", "names"}
        self._kept = (state["grams"].clone(), state["losses"].clone()) if fits else None
        self._names = tuple(state["names"]) if fits else ()


def _of_shared(squares: Tensor, layout: Layout) -> Tensor:
    """The squares [K], 0 for objectives without a gradient in what is shared."""
    alone = [i for i in range(len(squares)) if not layout.shared >> i & 1]
    if not alone:
        return squares
    squares = squares.clone()
    for i in alone:
        squares[i].zero_()
    return squares


class _Finite:
    """Sums each objective's squares as they are written: not finite if a gradient is not, zero if all are."""

    def __init__(self, options: Options) -> None:
        self._backend = options.backend
        self._totals: dict[int, Tensor] = {}  # [1, 1] float64 of each objective that has gradients
        self._objectives = 0
        self._written: set[tuple[int, int]] = set()  # (objective, parameter), by the calls before this one

    def watches(self, i: int, K: int) -> bool:
        return True

    def start(self, rows: Sequence[Sequence[Tensor | None]], balanced: Sequence[bool], reach: Reach) -> None:
        self._buckets, self._objectives = Buckets(self._backend), len(rows)
        self._now: set[tuple[int, int]] = set()

    def ready(self, i: int, t: int, gradient: Tensor) -> None:
        self._now.add((i, t))
        self._buckets.add((i, gradient.dtype, gradient.device), [gradient])

    def finish(self) -> None:
        self._buckets.finish()
        if self._now >= self._written:  # else what was written before counts, though some of it has grown since
            self._totals = {}
        self._written |= self._now
        for (i, _, _), part in self._buckets.grams.items():
            self._totals[i] = self._totals[i] + part.to(self._totals[i].device) if i in self._totals else part

    def squares(self) -> Tensor:
        """[K] float64, the sums."""
        first = next(iter(self._totals.values()), None)
        if first is None:
            return torch.zeros(self._objectives, dtype=torch.float64)
        zero = first if len(self._totals) == self._objectives else torch.zeros_like(first)
        totals = [self._totals.get(i, zero).to(first.device) for i in range(self._objectives)]
        return torch.cat(totals).view(-1)
