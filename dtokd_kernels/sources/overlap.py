"""The exact Gram matrix, with its products taken during the last backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .. import kernels
from ..reach import Reach
from ..types import Balance, Options, Role
from ..watch import Watch
from .buckets import Buckets
from .source import Gathered, Source


@dataclass(eq=False)
class Overlap(Source):
    """Like `Exact`, but takes the products of each gradient of the last pass while it is still in cache.

    A hook on each parameter (`register_post_accumulate_grad_hook`, set for that pass only) collects a megabyte of
    gradients and takes their products; what the last objective does not reach follows after the pass. `step` adds up
    matrices and updates: no pass over the gradients for the Gram matrix remains.

    Cost: K backward passes; one read of K - 1 gradients from memory inside the last of them, in each call of
    `backward` (under accumulation all but the last call's products are thrown away). Weights: exact, with products
    summed in another order. On several ranks (`dtokd_kernels.distributed`) the products are taken when the last pass's
    gradients have been reduced, while later buckets are on their way.
    """

    def watch(self, options: Options) -> Watch | None:
        """Takes the products."""
        return _Products(options)

    def solve(self, gathered: Gathered, options: Options) -> Balance:
        """The balance of the products that the backward passes left."""
        assert isinstance(gathered.watch, _Products)
        if not gathered.watch.up_to_date():  # a step in which private parameters were found out
            return super().solve(gathered, options)
        losses = gathered.losses
        grams = kernels.unscaled(gathered.watch.grams(losses), gathered.scale)
        if gathered.ranks is not None:
            grams, losses = gathered.ranks.total(grams, losses)
        return kernels.balance(grams, losses, options)


class _Products:
    """Gram matrices of the parameters by reach, and by whether their group is balanced."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def watches(self, i: int, K: int) -> bool:
        return i == K - 1

    def start(self, rows: Sequence[Sequence[Tensor | None]], balanced: Sequence[bool], reach: Reach) -> None:
        self._rows, self._balanced, self._reach, self._version = rows, balanced, reach, reach.version
        self._buckets = Buckets(self._options.backend)
        self._seen: set[int] = set()
        self._again = False

    def ready(self, i: int, t: int, gradient: Tensor) -> None:
        if t in self._seen:
            # a parameter that several checkpointed segments use gets its gradient in parts
            self._again = True
        self._seen.add(t)
        self._add(t, [*(row[t] for row in self._rows[:i]), gradient])

    def finish(self) -> None:
        if self._again:
            self._buckets, self._seen = Buckets(self._options.backend), set()
        for t, column in enumerate(zip(*self._rows, strict=True)):
            if t not in self._seen and any(g is not None for g in column):
                self._add(t, column)
        self._buckets.finish()

    def _add(self, t: int, column: Sequence[Tensor | None]) -> None:
        there = tuple(i for i, g in enumerate(column) if g is not None)
        first = column[there[0]]
        assert first is not None
        self._buckets.add((self._balanced[t], self._reach.of(t, column), first.dtype, first.device), column)

    def up_to_date(self) -> bool:
        """Whether the roles are those that the products were taken for."""
        return self._version == self._reach.version

    def grams(self, losses: Tensor) -> Tensor:
        grams: dict[Role, Tensor] = {}
        parts = self._buckets.grams
        roles = self._options.roles([reach if balanced else None for balanced, reach, _, _ in parts])
        for role, part in zip(roles, parts.values(), strict=True):
            grams[role] = grams[role] + part.to(grams[role].device) if role in grams else part
        return kernels.by_role(grams, losses)
