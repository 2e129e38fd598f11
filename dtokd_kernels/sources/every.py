"""Weights that are measured in every n-th step and kept in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels, reference
from ..types import Balance, Options, Role
from .names import measuring
from .source import Call, Gathered, Given, Source, remember
from .unmeasured import stand_in
from .wrapper import Wrapper


@dataclass(eq=False)
class Every(Wrapper):
    """Measure as another source does in every n-th step; keep the weights pi in between.

    Cost: one full backward pass and nothing else in the steps between, where every parameter takes sum_i c_i g_i
    with c_i = pi_i / L_i of this step's losses (private ones too, as with `Probe`). `balance.gram` is the last
    measured one. An objective that is at its lower bound now (`reference.at_bound`) is left out of both; if what is
    left has no positive sum of weights, the others count alike. Weights: as good as they are slow to change; where they
    are noise of the mini-batch, stale ones are of no use: see `Ema`. If a step that measures is skipped, the weights
    before it stay; at first equal ones. Steps are counted on the host: of a CUDA graph capture one that measures and
    one that does not.

    Args:
        n: steps from one measurement to the next; 1 measures in all of them.
        source: how to measure; a name or an object.

    Raises:
        TypeError, ValueError: n is not a positive integer; no such source.
    """

    n: int
    source: Source | str = "exact"
    _taken: int = field(default=0, init=False, repr=False)  # steps since the last measurement, that one included
    _names: tuple[str, ...] = field(default=(), init=False, repr=False)
    _weights: Tensor | None = field(default=None, init=False, repr=False)
    _gram: Tensor | None = field(default=None, init=False, repr=False)
    _fresh: bool = field(default=False, init=False, repr=False)  # whether this step was measured

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or isinstance(self.n, bool) or self.n < 1:
            raise ValueError(f"Every: n is {self.n!r}; pass a positive number of steps, such as 10")
        self.source = measuring("Every", self.source)

    def begin(self) -> Source:
        """The same choice, not measured yet."""
        return Every(self.n, self.inner.begin())

    def _measures(self, names: tuple[str, ...]) -> bool:
        return self._weights is None or names != self._names or self._taken >= self.n

    def one_pass(self, names: tuple[str, ...], params: Sequence[Tensor]) -> bool:
        """Between measurements, or if the source itself takes one."""
        return not self._measures(names) or self.inner.one_pass(names, params)

    def weigh(self, call: Call, options: Options) -> Balance:
        """The source's weights, or the last ones."""
        # and no longer what a call measured that no step has followed
        self._fresh = self._measures(call.names) and self.inner.one_pass(call.names, call.params)
        if self._fresh:
            return self.inner.weigh(call, options)
        assert self._weights is not None
        assert self._gram is not None
        device = call.losses.device
        gone = reference.at_bound(call.losses, options)
        left, instead = ~gone, stand_in(call.losses, options)
        weights = torch.where(left, self._weights.to(device), 0.0)
        gram = torch.where(left[:, None] & left, self._gram.to(device), 0.0)
        nobody = gone.any() & (weights.sum() <= 0)
        weights = torch.where(nobody, left.double() / left.sum().clamp(min=1), weights)
        gram = torch.where(nobody, instead, gram)
        kept = Given(weights, options.log_gradients)
        grams = kernels.by_role({Role.SHARED: gram}, call.losses)
        return kernels.balance(grams, call.losses, replace(options, weighting=kept))

    def solve(self, gathered: Gathered, options: Options) -> Balance:
        """The balance of K gradients, whose Gram matrix is measured in this step."""
        self._fresh = True
        return self.inner.solve(gathered, options)

    def commit(self, names: tuple[str, ...], balance: Balance) -> None:
        """Count the step; remember what was measured."""
        if self._fresh:
            self.inner.commit(names, balance)
            if self._weights is None or self._gram is None or names != self._names:
                self._weights = torch.full_like(balance.weights, 1 / len(names))
                self._gram = torch.eye(len(names), dtype=torch.float64, device=balance.gram.device)
            self._weights = remember(self._weights, balance.weights, balance.skipped)
            self._gram = remember(self._gram, balance.gram, balance.skipped)
            self._names, self._taken, self._fresh = names, 0, False
        self._taken += 1

    def state_dict(self) -> dict[str, Any]:
        """The last weights with their Gram matrix, and how many steps ago they were measured."""
        if self._weights is None or self._gram is None:
            return super().state_dict()
        return {
            **super().state_dict(),
            "weights": self._weights.clone(),
            "gram": self._gram.clone(),
            "names": list(self._names),
            "taken": self._taken,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with these weights, or measure in the next step."""
        super().load_state_dict(state)
        fits = state.keys() >= {"weights", "gram", "names", "taken"}
        self._weights, self._gram = (state["weights"].clone(), state["gram"].clone()) if fits else (None, None)
        self._names, self._taken = (tuple(state["names"]), state["taken"]) if fits else ((), 0)
