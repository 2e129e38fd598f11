"""A running average of the Gram matrix: the remedy where weights are noise of the mini-batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..asking import ask
from ..implementations import solves
from ..types import Balance, Options
from .names import measuring
from .source import Call, Gathered, Source, remember
from .wrapper import Wrapper


@dataclass(eq=False)
class Ema(Wrapper):
    """Weigh an exponential average of the Gram matrices that another source measures, not the last one.

    What is averaged is the matrix that the weighting asks for: that of the log-gradients, which has no units, or the
    raw one. Not the weights: the weights of a mean are not the mean of the weights. Corrected for its start, as Adam's
    moments are: A_t = sum_s beta^(t-s) G_s / sum_s beta^(t-s). Clipping and `balance` use what this step measured.

    An objective without a gradient keeps its squared norm's average in that step, while its cosines with those that
    have one fade. Each objective i has a clock n_i, the number of its steps with a gradient, and a share
    d_i = 1 - beta^n_i, which is all that its squared norms have been averaged with:

        A_ij = T_ij / sqrt(d_i d_j),   T = (1 - beta) sum_s B_s P_s G_s P_s B_s,

    where the diagonal matrix P_s keeps the rows of objectives with a gradient in step s, and the diagonal matrix B_s
    has sqrt(beta) to the number of i's steps with a gradient since s. Every term is a Gram matrix whose rows and
    columns were multiplied with the same numbers, so T and A are Gram matrices: positive semidefinite, with cosines of
    at most 1 (to rounding). With a gradient in all steps, all clocks agree and this is the formula above.

    Cost: that of the source. Weights: smoother, and 1 / (1 - beta) steps behind.

    Args:
        beta: share of the average that stays, 0 <= beta < 1; 0 averages nothing.
        source: how to measure; a name or an object.

    Raises:
        TypeError, ValueError: beta is outside its range; no such source.
    """

    beta: float
    source: Source | str = "exact"
    _names: tuple[str, ...] = field(default=(), init=False, repr=False)
    _kept: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)  # T [K, K] and d [K]
    #: what the step's measurement found, and what it made of it
    _next: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.beta, (int, float)) or not 0 <= self.beta < 1:
            raise ValueError(f"Ema: beta is {self.beta!r}; pass a number from 0 to below 1, such as 0.9")
        self.source = measuring("Ema", self.source)

    def begin(self) -> Source:
        """The same choice, with nothing averaged yet."""
        return Ema(self.beta, self.inner.begin())

    def weigh(self, call: Call, options: Options) -> Balance:
        """The balance of the averaged Gram matrix, before the one full pass."""
        return self.inner.weigh(call, self._averaging(call.names, options))

    def solve(self, gathered: Gathered, options: Options) -> Balance:
        """The balance of the averaged Gram matrix, of K gradients."""
        return self.inner.solve(gathered, self._averaging(gathered.names, options))

    def _averaging(self, names: tuple[str, ...], options: Options) -> Options:
        return replace(options, weighting=_Averaged(self, names, options))

    def average(self, names: tuple[str, ...], gram: Tensor) -> Tensor:
        """The average that counts this matrix as the last; remembered when the step is over."""
        before = self._kept
        if before is None or names != self._names:
            before = torch.zeros_like(gram), torch.zeros_like(gram[0])
        total, shares = (t.to(gram.device) for t in before)
        present = gram.diagonal() != 0  # NaN is no absence
        both, one = present[:, None] & present[None, :], present[:, None] | present[None, :]
        total = torch.where(
            both, self.beta * total + (1 - self.beta) * gram, torch.where(one, math.sqrt(self.beta) * total, total)
        )
        shares = torch.where(present, self.beta * shares + (1 - self.beta), shares)
        self._next = before, (total, shares)
        return torch.where(both, total / (shares[:, None] * shares[None, :]).sqrt(), 0.0)

    def commit(self, names: tuple[str, ...], balance: Balance) -> None:
        """Take over what the step's measurement made of the average."""
        self.inner.commit(names, balance)
        if self._next is not None:
            (total, shares), (new_total, new_shares) = self._next
            self._kept = remember(total, new_total, balance.skipped), remember(shares, new_shares, balance.skipped)
            self._names = names
        self._next = None

    def state_dict(self) -> dict[str, Any]:
        """The average: the sum of matrices [K, K] and the objectives' shares [K]."""
        if self._kept is None:
            return super().state_dict()
        total, shares = (t.clone() for t in self._kept)
        return {**super().state_dict(), "total": total, "shares": shares, "names": list(self._names)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with this average, or start anew."""
        super().load_state_dict(state)
        fits = state.keys() >= {"total", "shares", "names"} and state["shares"].dim() == 1
        self._kept = (state["total"].clone(), state["shares"].clone()) if fits else None
        self._names = tuple(state["names"]) if fits else ()
        self._next = None


class _Averaged:
    """A weighting of the average instead of the matrix that it is given."""

    def __init__(self, ema: Ema, names: tuple[str, ...], options: Options) -> None:
        self.log_gradients = options.log_gradients
        self._ema, self._names, self._options = ema, names, options

    def __call__(self, gram: Tensor, losses: Tensor) -> Any:
        average = self._ema.average(self._names, gram)
        weighting = self._options.weighting
        if solves(self._options):  # for which backends have a kernel
            backend = backends.select(gram.device, self._options.backend)
            return backend.min_norm_weights(average, getattr(weighting, "clamp", True), average.diagonal() > 0)
        return ask(weighting, average, losses)
