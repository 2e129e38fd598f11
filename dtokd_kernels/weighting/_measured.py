"""What rules have in common that learn from measurements on held-out samples."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ._names import check_primary, position_of
from .stateful import Memory, Stateful, choose

#: Steps without any look after which there is a warning.
PATIENCE = 100


class Observing(Stateful):
    """A rule whose weights are constants until it is given another look at held-out samples.

    A subclass is a dataclass with a field `primary`, names in `_look` what the user calls, and counts the looks in
    `_measurements`.
    """

    primary: str | int
    log_gradients: ClassVar[bool] = False
    needs_gram: ClassVar[bool] = False
    _look: ClassVar[str]
    _steps = 0  # taken before the first look
    _measurements = 0
    _saved = ("measurements",)

    def expect(self, names: tuple[str, ...]) -> None:
        """Take the names of the objectives whose losses come next.

        Raises:
            ValueError: the primary one is not among them, or they are not those of the memory.
        """
        check_primary(type(self).__name__, self.primary, names)
        super().expect(names)

    def place(self, K: int) -> int:
        """Position of the primary objective among K."""
        return position_of(type(self).__name__, self.primary, self._expected, K)

    def alone(self, gram: Tensor) -> Tensor:
        """[K] float64: weight 1 for the primary objective, and 0 for the others."""
        K = len(gram)
        p = self.place(K) if K > 1 else 0
        return (torch.arange(K, device=gram.device) == p).double()

    def commit(self, skipped: Tensor) -> None:
        """Take over what the last call proposed; warn once if many steps were taken without a look."""
        super().commit(skipped)
        if self._measurements:
            return
        self._steps += 1
        if self._steps == PATIENCE:
            warnings.warn(
                f"{type(self).__name__}: there was no look at held-out samples in {PATIENCE} steps, and the primary "
                f"objective alone was trained; call {self._look} every few steps",
                stacklevel=2,
            )


class Measured(Observing):
    """A rule that learns from gradients on held-out samples (`dtokd_kernels.measure_held_out`).

    A subclass has `learn`. Its memory has "weights" [K].
    """

    _look = "measure_held_out(optimizer, losses, held_out_loss)"

    @abstractmethod
    def learn(self, memory: Memory, gram: Tensor, p: int) -> Memory:
        """The memory after a measurement, without side effects.

        Args:
            memory: before it.
            gram: [K + 1, K + 1] float64, of the K objectives and the held-out gradient, in units of the larger of the
                squares of the primary and the held-out one.
            p: position of the primary objective.
        """

    def conclude(self, memory: Memory, p: int) -> Memory:
        """What follows once there are no more measurements; asked also if the last one was left out.

        Args:
            memory: after them.
            p: position of the primary objective.
        """
        return {}

    @property
    def done(self) -> bool:
        """Whether further measurements would change nothing."""
        return False

    def advance(self, memory: Memory, gram: Tensor, losses: Tensor) -> tuple[Tensor, Memory]:
        """The weights of the last measurement."""
        return memory["weights"].clone(), memory

    @torch.no_grad()
    def observe(self, gram: Tensor, names: Sequence[str] = ()) -> None:
        """Take over a measurement.

        Args:
            gram: [K + 1, K + 1] float64, products of the K gradients of a training batch and, last, of the primary
                loss's gradient on held-out samples. If a number is not finite, or the primary gradient is zero, nothing
                changes.
            names: of the K objectives; default: their positions.

        Raises:
            ValueError: the primary objective is not among them, or they are not those of the memory.

        Effects: no host sync.
        """
        K = len(gram) - 1
        self.expect(tuple(names) or tuple(map(str, range(K))))
        gram = gram.double()
        self(gram[:K, :K], torch.ones_like(gram[0, :K]))  # makes the memory, or checks that it is of K objectives
        assert self._next is not None
        self._memory, _ = self._next
        self._next = None
        self._names = self._expected
        self._measurements += 1
        p = self.place(K)
        # gradients shrink while a model learns, and the first measurements are not to rule an average; nor is a batch
        # that the model fits already, whose own square as the unit would make all its other products large
        unit = torch.maximum(gram[p, p], gram[K, K])
        measured = gram / unit
        new = {**self._memory, **self.learn(self._memory, measured, p)}
        self._write(choose(~(measured.isfinite().all() & (gram[p, p] > 0)), self._memory, new))
        if self.done:
            self._write(self.conclude(self._memory, p))
