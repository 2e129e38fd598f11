"""What an optimizer asks of a backend after the balance: updates of buckets of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import backends
from .ops import of_reach
from .types import Balance, Role


@dataclass(frozen=True)
class Update:
    """One update rule on tensors of one parameter group, role, reach, dtype and device.

    Attributes:
        rule: which function of `reference` says what happens: `adamw_step` or `sgd_step`.
        role: the row of the balance's table that multiplies the gradients.
        reach: the objectives that have a gradient here, in increasing order.
        params: the parameters.
        grads: one list for each objective in `reach`.
        state: lists of state tensors, by the rule's argument names.
        options: the rule's other keywords, such as lr.
    """

    rule: Literal["adamw_step", "sgd_step"]
    role: Role
    reach: tuple[int, ...]
    params: list[Tensor]
    grads: list[list[Tensor]]
    state: dict[str, list[Tensor]]
    options: dict[str, Any]


def run_updates(updates: Iterable[Update], balance: Balance, backend: str | None = None) -> None:
    """Update parameters and state in place, or change nothing where the balance says `skipped`.

    A backend with a function `run_updates(updates, table, skipped)` takes all updates of a device at once, so that
    they share launches; the others take them one by one.

    Args:
        updates: in the order in which memory should be walked.
        balance: of this step.
        backend: the optimizer's choice.

    Effects: no host sync.
    """
    by_device: dict[torch.device, list[Update]] = {}
    for update in updates:
        by_device.setdefault(update.params[0].device, []).append(update)
    for device, same in by_device.items():
        module = backends.select(device, backend)
        table, skipped = balance.table.to(device), balance.skipped.to(device)
        if hasattr(module, "run_updates"):
            module.run_updates(same, table, skipped)
            continue
        for update in same:
            step = getattr(module, update.rule)
            coefficients = of_reach(table[update.role], update.reach)
            step(
                params=update.params,
                grads=update.grads,
                **update.state,
                coefficients=coefficients,
                skipped=skipped,
                **update.options,
            )
