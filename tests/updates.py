"""Updates as tests write them, list by list, and the means to run them by any implementation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import dtokd_kernels as dk
from dtokd_kernels.plan import Plan, Step, make_parts
from dtokd_kernels.rows import GradientRows
from dtokd_kernels.rules import RULES
from dtokd_kernels.types import Options, Role


@dataclass
class Update:
    """Parameters of one group and role that the same objectives reach.

    Attributes:
        rule: its name.
        role: of all parameters.
        reach: the objectives that have a gradient here, in increasing order.
        params: the parameters.
        grads: one list for each objective in `reach`.
        state: a list for each of torch's names.
        options: the rule's hyper-parameters.
    """

    rule: str
    role: Role
    reach: tuple[int, ...]
    params: list[Tensor]
    grads: list[list[Tensor]]
    state: dict[str, list[Tensor]]
    options: dict[str, Any]

    def clone(self) -> Update:
        """With parameters and state of its own."""
        state = {name: [t.clone() for t in values] for name, values in self.state.items()}
        return replace(self, params=[p.clone() for p in self.params], state=state, options=dict(self.options))

    def tensors(self) -> list[Tensor]:
        """All that is written."""
        return [*self.params, *(t for values in self.state.values() for t in values)]


def gradient_rows(lists: list[list[Tensor]], reach: tuple[int, ...] | None = None, role: int = 0) -> GradientRows:
    """Rows of gradients in lists, one for each objective in `reach` (default: all)."""
    reach = tuple(range(len(lists))) if reach is None else reach
    columns = []
    for values in zip(*lists, strict=True):
        there = dict(zip(reach, values, strict=True))
        columns.append([there.get(i) for i in range(max(reach) + 1)])
    return GradientRows.of(columns, [role] * len(columns))


def step_of(by: Any, updates: list[Update], backend: str | None = None) -> tuple[Step, dict[str, list[int]]]:
    """A step with these updates, of one rule, and what kernels lack for it."""
    [rule] = {update.rule for update in updates}
    rows = [gradient_rows(update.grads, update.reach, update.role) for update in updates]
    params = [p for update in updates for p in update.params]
    grads = GradientRows(
        [g for r in rows for g in r.grads],
        replace(
            rows[0].layout,
            reach=[mask for r in rows for mask in r.layout.reach],
            role=[role for r in rows for role in r.layout.role],
        ),
    )
    states = [
        {name: values[t] for name, values in update.state.items()}
        for update in updates
        for t in range(len(update.params))
    ]
    groups = [(index, False) for index, update in enumerate(updates) for _ in update.params]
    plan = Plan(RULES[rule], params, list(range(len(params))), [g for g, _ in groups], grads.layout)
    with dk.use_backend(by.name):
        parts, lacking = make_parts(plan, states, groups, lambda g: updates[g[0]].options, grads, None)
    numbers = [[updates[g[0]].options for g in part.groups] for part in parts]
    return Step(parts, grads, numbers, Options(dk.weighting.DTO()), None), lacking


def run(by: Any, updates: list[Update], table: Tensor, skipped: Tensor) -> Tensor:
    """Carry out updates; whether that was skipped."""
    for rule in RULES:
        same = [update for update in updates if update.rule == rule]
        if same:
            skipped = step_of(by, same)[0].update(table, skipped)
    return skipped


def measure_and_run(by: Any, updates: list[Update], table: Tensor, skipped: Tensor) -> Tensor:
    """The same; the Gram matrices [3, K, K] of the gradients."""
    return step_of(by, updates)[0].measure_and_update(table, skipped)[0]


def flag(value: bool = False) -> Tensor:
    """A scalar bool."""
    return torch.tensor(value)
