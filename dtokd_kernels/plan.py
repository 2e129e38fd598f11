"""A plan: which parameters a step updates, as rows, and what updates each. Made once, and kept until something changes.

What the kernels of a backend lack is found here: the reference updates such rows, and a warning names them. Updates
whose numbers may not be finite though the direction is are tried on copies first: the largest float16 number is 65504,
and the square of a gradient of 300 or a sum of momenta leaves it, which no bound on the gradients' length can exclude
without skipping good steps. Other dtypes reach 1e38, where a bound costs nothing (`types.limit_of`). AdamW with eps = 0
divides 0 by 0 where no gradient has been.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends
from .implementations import Implementation, Numbers
from .ranks import Ranks
from .rows import GradientRows, Layout, Rows
from .rules import Rule
from .types import Options

#: A group's hyper-parameters are those of a parameter group; True: the state of its rows begins with this step.
Group = tuple[int, bool]

_Held = tuple[list[object], list[object], list[int]]


@dataclass(eq=False)
class Part:
    """Rows that one implementation updates together.

    Attributes:
        rows: the rows.
        places: of these rows in the plan.
        groups: that the rows' `group` counts.
        by: the implementation.
        tried: whether the update is tried on copies first.
    """

    rows: Rows
    places: list[int]
    groups: list[Group]
    by: Implementation
    tried: bool


@dataclass(eq=False)
class Plan:
    """The parameters of a step, in the order of the parameter groups, without those that no objective reaches.

    Attributes:
        rule: the update rule.
        params: of each row.
        positions: of each row, of its parameter among all of the optimizer.
        groups: of each row, its parameter group's number.
        layout: which gradients there are.
        parts: the rows by implementation; None until the first update.
        held: the parameters that had a state when the parts were made, what these held, and the parameters' addresses;
            None if the parts are for one step.
    """

    rule: Rule
    params: list[Tensor]
    positions: list[int]
    groups: list[int]
    layout: Layout
    parts: list[Part] | None = None
    held: _Held | None = None

    def gradients(self, sets: Sequence[Sequence[Tensor | None]]) -> GradientRows:
        """The rows' gradients from gradient sets, which are there where they were when the plan was made."""
        if self._everywhere == len(sets) and len(self.positions) == len(sets[0]):
            return GradientRows(list(itertools.chain.from_iterable(zip(*sets, strict=True))), self.layout)
        return GradientRows([g for t in self.positions for row in sets if (g := row[t]) is not None], self.layout)

    @functools.cached_property
    def _everywhere(self) -> int:
        """How many objectives there are, if the rows are the first parameters and all reach all of them; else 0."""
        K = max((reach.bit_length() for reach in self.layout.reach), default=0)
        every = all(reach == (1 << K) - 1 for reach in self.layout.reach)
        return K if every and self.positions == list(range(len(self.positions))) else 0

    def hold(self, state: Mapping[Tensor, dict[str, object]]) -> None:
        """Remember what the parts were made of."""
        self.held = _held(state, self.params)

    def is_of(self, state: Mapping[Tensor, dict[str, object]]) -> bool:
        """Whether the parts are of what is in an optimizer's state, and of the parameters as they are."""
        if self.parts is None or self.held is None:
            return False
        (keys, values, addresses), now = self.held, _held(state, self.params)
        same = len(keys) == len(now[0]) and len(values) == len(now[1])
        same = same and all(map(operator.is_, keys, now[0])) and all(map(operator.is_, values, now[1]))
        return same and addresses == now[2]


def _held(state: Mapping[Tensor, dict[str, object]], params: Sequence[Tensor]) -> _Held:
    """An optimizer's state in its order, which takes no look for each parameter; see `Plan.held`."""
    values = itertools.chain.from_iterable(map(dict.values, state.values()))
    return list(state), list(values), list(map(Tensor.data_ptr, params))


def make_parts(
    plan: Plan,
    states: Sequence[dict[str, Tensor]],
    groups: Sequence[Group],
    numbers: Callable[[Group], Numbers],
    grads: GradientRows,
    backend: str | None,
) -> tuple[list[Part], dict[str, list[int]]]:
    """Decide which implementation updates each row of a plan.

    Args:
        plan: the plan.
        states: of each row, what the rule needs.
        groups: of each row.
        numbers: the hyper-parameters of a group.
        grads: this step's gradients.
        backend: that the user wants; None: the best for each device.

    Returns:
        The parts; and the rows that the reference updates because the kernels cannot, by what these lack.
    """
    found: dict[tuple[torch.device, str, bool], list[int]] = {}
    by: dict[str, Implementation] = {}
    lacking: dict[str, list[int]] = {}
    for t, (p, state, column) in enumerate(zip(plan.params, states, grads.columns(), strict=True)):
        chosen = backends.select(p.device, backend)
        of_group = numbers(groups[t])
        lacks = chosen.lacks(plan.rule, p, state, of_group)
        if lacks is None and chosen.name != "reference" and any(g.dtype != p.dtype for g in column):
            lacks = "gradients of another dtype than their parameter"
        if lacks is not None:
            lacking.setdefault(f"backend {chosen.name!r} has no kernel for {lacks}", []).append(plan.positions[t])
            chosen = backends.REFERENCE
        by[chosen.name] = chosen
        narrow = any(tensor.dtype is torch.float16 for tensor in (p, *state.values()))
        tried = narrow or of_group.get("eps") == 0
        found.setdefault((p.device, chosen.name, tried), []).append(t)
    parts = []
    for (device, name, tried), places in found.items():
        distinct = list(dict.fromkeys(groups[t] for t in places))
        rows = Rows(
            plan.rule,
            [plan.params[t] for t in places],
            [states[t] for t in places],
            Layout([plan.layout.reach[t] for t in places], [plan.layout.role[t] for t in places], device),
            [distinct.index(groups[t]) for t in places],
        )
        parts.append(Part(rows, places, distinct, by[name], tried))
    return parts, lacking


@dataclass(eq=False)
class Step:
    """One step: parts of a plan with their gradients and hyper-parameters.

    Attributes:
        parts: what is updated.
        grads: the gradients of all rows of the plan.
        numbers: the hyper-parameters of each part's groups.
        options: of the balance.
        ranks: the other processes that train the same model, which agree if they hold shards; None if there are none.
    """

    parts: list[Part]
    grads: GradientRows
    numbers: list[list[Numbers]]
    options: Options
    ranks: Ranks | None

    @functools.cached_property
    def _each(self) -> list[tuple[Part, GradientRows, list[Numbers]]]:
        whole = len(self.parts) == 1
        grads = [self.grads if whole else self.grads.take(part.places) for part in self.parts]
        return list(zip(self.parts, grads, self.numbers, strict=True))

    def update(self, coefficients: Tensor, skipped: Tensor) -> Tensor:
        """Update parameters and state in place, or change nothing where `skipped`.

        Args:
            coefficients: [3, S] float64, what multiplies the S gradient sets, by `Role`.
            skipped: scalar bool.

        Returns:
            Scalar bool on the device of `skipped`: it, or numbers that the updates would have written are not finite,
            so that nothing has changed.

        Effects: no host sync. Updates that are tried cost a copy of what they write, and a read of the copy.
        """
        return self._run(coefficients, skipped, None)

    def measure_and_update(self, coefficients: Tensor, skipped: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the Gram matrices of the gradients from the same pass over them.

        Returns:
            [3, K, K] float64 on the device of the coefficients, one matrix for each `Role`; also where nothing was
            updated. And as `update`.
        """
        grams: list[Tensor] = []
        skipped = self._run(coefficients, skipped, grams)
        if not grams:
            K = coefficients.shape[1]
            grams.append(coefficients.new_zeros(coefficients.shape[0], K, K))
        return functools.reduce(Tensor.add, grams), skipped

    def _run(self, coefficients: Tensor, skipped: Tensor, grams: list[Tensor] | None) -> Tensor:
        def run(part: Part, rows: Rows, grads: GradientRows, numbers: list[Numbers]) -> None:
            device = rows.params[0].device
            table, skip = coefficients.to(device), skipped.to(device)
            measured = part.by.update(rows, grads, numbers, table, skip, grams is not None)
            if grams is not None and measured is not None:
                grams.append(measured.to(coefficients.device))

        trials = []
        for part, grads, numbers in self._each:
            if part.tried:
                trials.append(_Trial(part.rows))
                run(part, trials[-1].rows, grads, numbers)
        if trials:
            finite = functools.reduce(torch.logical_and, [trial.finite().to(skipped.device) for trial in trials])
            overflow = ~finite
            if self.ranks is not None and self.ranks.shards:
                overflow = self.ranks.sum(overflow.double()) > 0
            skipped = skipped | overflow
            for trial in trials:
                trial.keep(~skipped)
        for part, grads, numbers in self._each:
            if not part.tried:
                run(part, part.rows, grads, numbers)
        return skipped


class _Trial:
    """Rows whose update writes to copies."""

    def __init__(self, rows: Rows) -> None:
        params = [p.detach().clone() for p in rows.params]
        state = [{name: tensor.detach().clone() for name, tensor in held.items()} for held in rows.state]
        self.rows = Rows(rows.rule, params, state, rows.layout, rows.group)
        self._written = list(zip(rows.written, self.rows.written, strict=True))

    def finite(self) -> Tensor:
        """Scalar bool: whether all that was written is finite, or was not before."""
        good = [(copy.isfinite() | ~tensor.isfinite()).all() for tensor, copy in self._written]
        return functools.reduce(torch.logical_and, [each.to(good[0].device) for each in good])

    def keep(self, kept: Tensor) -> None:
        """Let the tensors be what their copies are, where `kept` (scalar bool)."""
        for tensor, copy in self._written:
            tensor.copy_(torch.where(kept.to(tensor.device), copy, tensor))
