"""Which objectives reach which parameters, whether autograd writes None or zeros where one does not."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Others(Protocol):
    """What a look for zeros asks of the other processes that train the model (`ranks.Ranks`)."""

    shards: bool

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This process's parts of tensors."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""


@dataclass
class Known:
    """What was found out, which outlasts the gradients.

    Attributes:
        reached: from a parameter to {objective: whether its gradient there was seen to be other than zero; None while
            the objective has had no gradient anywhere}.
        steps: since the last pair that was new.
        absent: whether some objective had no gradient at all.
    """

    reached: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    steps: int = 0
    absent: bool = False


class Reach:
    """Knows where an objective's gradient was seen to be other than zero.

    Where an objective does not reach a parameter, an eager graph leaves None; a compiled one, a reentrant checkpoint or
    a function of the user's returns zeros. Both are the same here: an objective reaches a parameter once its gradient
    there was not exactly zero. That decides the parameter's role alone, never which gradients it takes: if an objective
    begins to reach it unnoticed, its gradient counts, as that of a private parameter.

    To look for zeros is to wait for the device. It is done in the first step with new parameters or objectives; again,
    where there were zeros, in the 2nd, 4th, 8th, ... step after that; and in every step while an objective has had no
    gradient anywhere (its loss is at its bound). Until then what is not None is taken as reached. In a CUDA graph
    capture nothing is looked for.

    Args:
        known: what was found out before.

    Attributes:
        version: changes with the answers of `of` for what was asked before.
        params: what the questions are about.
    """

    def __init__(self, known: Known | None = None) -> None:
        self.version = 0
        self._known = Known() if known is None else known
        self.params: list[Tensor] = []
        self._names: tuple[str, ...] = ()
        self._pattern: list[list[bool]] | None = None
        self._zeros: list[tuple[int, int]] = []  # (objective, parameter) with a gradient that was always zero

    def __reduce__(self) -> Any:
        return Reach, ()  # a copy's parameters are others

    def begin(self, names: tuple[str, ...], params: Sequence[Tensor]) -> None:
        """Name what the next questions are about."""
        same = len(params) == len(self.params) and all(map(operator.is_, params, self.params))
        if not same or names != self._names:
            self.params, self._names, self._pattern = list(params), names, None

    def of(self, t: int, column: Sequence[Tensor | None]) -> tuple[int, ...]:
        """The objectives that reach parameter t; those with a gradient in the column if all of these were zeros."""
        there = tuple(i for i, g in enumerate(column) if g is not None)
        known = self._known.reached.get(self.params[t], {})
        return tuple(i for i in there if known.get(self._names[i]) is not False) or there

    def look(self, rows: Sequence[Sequence[Tensor | None]], ranks: Others | None) -> None:
        """A step begins: look for gradients that are zero, if it is time.

        Args:
            rows: a gradient set per objective.
            ranks: the other processes that train the model; all look in the same steps.
        """
        if len(rows) < 2:
            return
        pattern = [list(map(operator.is_, row, itertools.repeat(None))) for row in rows]
        if pattern != self._pattern:
            self._pattern = pattern
            self._find(rows)
        self._known.steps += 1
        doubled = self._known.steps & (self._known.steps - 1) == 0
        if self._zeros and (doubled or self._known.absent) and not _capturing(rows):
            self._read(rows, ranks)

    def _find(self, rows: Sequence[Sequence[Tensor | None]]) -> None:
        """The pairs that are there and were not seen to be other than zero."""
        self._zeros = []
        for t, p in enumerate(self.params):
            known = self._known.reached.setdefault(p, {})
            for i, row in enumerate(rows):
                if row[t] is None or not p.numel():
                    continue
                if self._names[i] not in known:
                    self._known.steps, known[self._names[i]] = 0, None  # a new one
                if not known[self._names[i]]:
                    self._zeros.append((i, t))

    def _read(self, rows: Sequence[Sequence[Tensor | None]], ranks: Others | None) -> None:
        gradients = [g for g in (rows[i][t] for i, t in self._zeros) if g is not None]
        if ranks is not None:
            gradients = ranks.local(gradients)
        device = gradients[0].device
        found = torch.stack([(g != 0).any().to(device) for g in gradients])
        if ranks is not None and ranks.shards:
            found = ranks.sum(found.double()) > 0
        flags = read(found)
        present = {self._names[i] for (i, _), reached in zip(self._zeros, flags, strict=True) if reached}
        present |= {name for p in self.params for name, reached in self._known.reached[p].items() if reached}
        for (i, t), reached in zip(self._zeros, flags, strict=True):
            known, name = self._known.reached[self.params[t]], self._names[i]
            before = known[name]
            if name in present:  # else nothing is known of it yet
                known[name] = reached
            self.version += (before is False) != (known[name] is False)
        self._known.absent = any(name not in present for name in self._names)
        self._zeros = [pair for pair, reached in zip(self._zeros, flags, strict=True) if not reached]

    def state_dict(self, params: Sequence[Tensor]) -> dict[str, Any]:
        """What was found: [K, P] int8, whether an objective reaches a parameter; 2 without any gradient yet, -1 if new.

        A run that goes on without it would look anew, and a gradient that is zero by chance then would change a step.

        Args:
            params: P parameters, in an order that `load_state_dict` finds again.
        """
        known = [self._known.reached.get(p, {}) for p in params]
        names = list(dict.fromkeys([*self._names, *(name for of_one in known for name in of_one)]))
        table = [[_CODES[of_one[name]] if name in of_one else -1 for of_one in known] for name in names]
        if all(value < 0 for row in table for value in row):
            return {}
        reached = torch.tensor(table, dtype=torch.int8, device="cpu")
        return {
            "reached": reached,
            "names": names,
            "steps": self._known.steps,
            "absent": self._known.absent,
        }

    def load_state_dict(self, state: Mapping[str, Any], params: Sequence[Tensor]) -> None:
        """Go on from a state, or look anew."""
        self._known.reached, self._known.steps, self._known.absent = WeakIdKeyDictionary(), 0, False
        self._pattern, self._zeros = None, []
        self.version += 1
        if state.keys() >= {"reached", "names", "steps", "absent"} and state["reached"].shape[1] == len(params):
            for p, column in zip(params, state["reached"].T.tolist(), strict=True):
                pairs = zip(state["names"], column, strict=True)
                self._known.reached[p] = {name: _MEANINGS[code] for name, code in pairs if code in _MEANINGS}
            self._known.steps, self._known.absent = state["steps"], state["absent"]
            self.begin(tuple(state["names"]), params)


#: How a state says what is known of a pair.
_CODES = {False: 0, True: 1, None: 2}
_MEANINGS = {code: value for value, code in _CODES.items()}
#: What calls of `dtokd_kernels.backward` have found out, by the first of their parameters.
_known = WeakIdKeyDictionary()


def of_backward(params: Sequence[Tensor]) -> Reach:
    """What earlier calls of `dtokd_kernels.backward` with these parameters have found out."""
    return Reach(_known.setdefault(params[0], Known()) if params else None)


def read(found: Tensor) -> list[bool]:
    """A bool tensor on the host: the one place where a step waits for the device."""
    values: list[bool] = found.tolist()
    return values


def _capturing(rows: Sequence[Sequence[Tensor | None]]) -> bool:
    device = next((g.device for row in rows for g in row if g is not None), None)
    on_gpu = device is not None and device.type == "cuda" and torch.cuda.is_available()
    return on_gpu and torch.cuda.is_current_stream_capturing()
