"""Rows: what belongs to one parameter. All operations take gradients row by row."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .rules import Rule
from .types import Role

#: Dtypes that kernels know.
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def objectives(reach: int) -> list[int]:
    """The objectives whose bits are set."""
    return [i for i in range(reach.bit_length()) if reach >> i & 1]


@dataclass(eq=False)
class Layout:
    """Which gradients there are, row by row.

    Attributes:
        reach: of each row; bit i is set if objective i has a gradient there.
        role: of each row, a `Role`.
        device: of all gradients; None if they are on several, or kernels do not know all of their dtypes.
    """

    reach: list[int]
    role: list[int]
    device: torch.device | None

    @functools.cached_property
    def roles(self) -> int:
        """Bit r is set if there are rows of role r."""
        return sum(1 << role for role in set(self.role))

    @functools.cached_property
    def shared(self) -> int:
        """Bit i is set if objective i has a gradient in a row that is in the Gram matrix."""
        reaches = [reach for reach, role in zip(self.reach, self.role, strict=True) if role == Role.SHARED]
        return functools.reduce(operator.or_, reaches, 0)


@dataclass(eq=False)
class GradientRows:
    """Gradients, row by row: of each row those of the objectives that reach it, in their order."""

    grads: list[Tensor]
    layout: Layout

    @classmethod
    def of(cls, columns: Sequence[Sequence[Tensor | None]], role: Sequence[int]) -> GradientRows:
        """From a column of K gradients or None for each row; rows without any are left out.

        Args:
            columns: of each row.
            role: of each row.
        """
        reach = [sum(1 << i for i, g in enumerate(column) if g is not None) for column in columns]
        grads = [g for column in columns for g in column if g is not None]
        roles = [r for r, mask in zip(role, reach, strict=True) if mask]
        return cls(grads, Layout([mask for mask in reach if mask], roles, _common(grads)))

    def columns(self) -> Iterator[list[Tensor]]:
        """The gradients of each row."""
        start = 0
        for reach in self.layout.reach:
            end = start + reach.bit_count()
            yield self.grads[start:end]
            start = end

    def take(self, rows: Sequence[int]) -> GradientRows:
        """Some of the rows."""
        columns = list(self.columns())
        grads = [g for t in rows for g in columns[t]]
        layout = self.layout
        return GradientRows(
            grads, Layout([layout.reach[t] for t in rows], [layout.role[t] for t in rows], _common(grads))
        )

    def apart(self) -> list[tuple[list[int], GradientRows]]:
        """The rows of each device, those of dtypes that kernels do not know by themselves; with their places here."""
        if self.layout.device is not None:
            return [(list(range(len(self.layout.reach))), self)]
        places: dict[tuple[torch.device, bool], list[int]] = {}
        for t, column in enumerate(self.columns()):
            places.setdefault((column[0].device, column[0].dtype in DTYPES), []).append(t)
        return [(rows, self.take(rows)) for rows in places.values()]


def _common(grads: Sequence[Tensor]) -> torch.device | None:
    devices = {g.device for g in grads}
    known = all(g.dtype in DTYPES for g in grads)
    return devices.pop() if len(devices) == 1 and known else None


@dataclass(eq=False)
class Rows:
    """Parameters that one rule updates, with all that belongs to each.

    Attributes:
        rule: the update rule.
        params: the parameters, on one device.
        state: of each row, by the rule's names; also "step" and "master", a float32 copy of a half-precision parameter.
        layout: which gradients there are.
        group: of each row, an index into the hyper-parameters.
        prepared: what an implementation has made of this, by its name.
    """

    rule: Rule
    params: list[Tensor]
    state: list[dict[str, Tensor]]
    layout: Layout
    group: list[int]
    prepared: dict[str, object] = field(default_factory=dict)

    @functools.cached_property
    def written(self) -> list[Tensor]:
        """All that an update writes to."""
        return [*self.params, *(tensor for state in self.state for tensor in state.values())]
