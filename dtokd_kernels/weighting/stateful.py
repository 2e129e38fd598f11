"""Weightings with a memory: what that is, and how a skipped step leaves it alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

Memory = dict[str, Tensor]


class Stateful(ABC):
    """A weighting with a memory: a few small tensors that the optimizers save and restore.

    A subclass has two functions without side effects: `initial` makes the memory, `advance` returns the weights and
    the memory of the next step. Calling the weighting changes nothing yet. `commit` takes over the next memory,
    unless the step was skipped; the optimizers and `backward` call it. After a `balance` of your own call it yourself.

    The memory is written in place, on the Gram's device and without reading it, so that a captured CUDA graph
    replays it. One object serves one optimizer.
    """

    _memory: Memory | None = None
    _next: tuple[Memory, Memory] | None = None  # what the last call found, and what it proposed
    _names: tuple[str, ...] = ()  # of the memory's objectives, where they are known
    _expected: tuple[str, ...] = ()
    #: numbers of the host that are saved beside the memory, by their attributes without the underscore
    _saved: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def initial(self, gram: Tensor) -> Memory:
        """The memory before the first step: scalars and tensors [K] on the Gram's device."""

    @abstractmethod
    def advance(self, memory: Memory, gram: Tensor, losses: Tensor) -> tuple[Tensor, Memory]:
        """Weights [K] of this step, and the memory that the next one finds if this one is not skipped."""

    def __call__(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Weights of a Gram matrix, of log-gradients or raw ones as `log_gradients` has it.

        Args:
            gram: [K, K] float64. Where the weighting has `needs_gram = False` only its size and device matter.
            losses: [K] float64, the objectives' values.

        Returns:
            [K] float64.

        Raises:
            ValueError: the memory is of another number of objectives.
        """
        memory = self.initial(gram) if self._memory is None else self._memory
        for name, value in memory.items():
            if value.dim() == 1 and len(value) != len(gram):
                raise ValueError(
                    f"{type(self).__name__}: {name} holds {len(value)} objectives, but there are {len(gram)}; "
                    "make a new weighting when the objectives change"
                )
            if value.device != gram.device:  # just loaded
                memory[name] = value.to(gram.device)
        weights, new = self.advance(memory, gram, losses)
        self._next = memory, new
        return weights

    def expect(self, names: tuple[str, ...]) -> None:
        """Take the names of the objectives whose losses come next.

        Raises:
            ValueError: the memory is that of as many other objectives, or of the same in another order.
        """
        if len(self._names) == len(names) and self._names != names:
            raise ValueError(
                f"{type(self).__name__}: the objectives so far were {list(self._names)}, but the losses are "
                f"{list(names)}; pass them in that order, or make a new weighting"
            )
        self._expected = names
        self._next = None  # of a call that no step followed

    @property
    def frozen(self) -> bool:
        """Whether the weights are constants from now on, so that a step takes one backward pass, of their sum."""
        return False

    @property
    def asked(self) -> bool:
        """Whether it was called since the last step, so that there is something to take over."""
        return self._next is not None

    def commit(self, skipped: Tensor) -> None:
        """Take over the memory that the last call proposed, once.

        Args:
            skipped: scalar bool: the step changes nothing, so the memory stays.
        """
        if self._next is not None:
            self._memory, new = self._next
            self._write(choose(skipped, self._memory, new))
            self._names = self._expected
        self._next = None

    def _write(self, new: Memory) -> None:
        assert self._memory is not None
        for name, value in new.items():
            self._memory[name].copy_(value)

    @property
    def rule(self) -> str:
        """Whose memory it is."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """A copy of the memory; under "rule" whose it is, and under "objectives" of which; empty before a step."""
        if self._memory is None:
            return {}
        memory = {name: value.clone() for name, value in self._memory.items()}
        numbers = {name: getattr(self, f"_{name}") for name in self._saved}
        return {**memory, **numbers, "rule": self.rule, "objectives": list(self._names)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; from an empty one, start anew.

        Raises:
            ValueError: it is another weighting's state. Nothing has changed then.
        """
        expected = self.initial(torch.eye(1, dtype=torch.float64))
        memory = {name: value for name, value in state.items() if name not in ("rule", "objectives", *self._saved)}
        rule = state.get("rule", self.rule)
        if memory and (memory.keys() != expected.keys() or rule != self.rule):
            raise ValueError(
                f"{self.rule}: the state is of {rule} and has {sorted(memory)}, expected {sorted(expected)}; it "
                "belongs to another weighting: load it into that one, or leave out the state dict's 'weighting'"
            )
        loaded = {name: memory[name].to(like.dtype, copy=True) for name, like in expected.items() if memory}
        self._memory = loaded or None
        self._names = tuple(state.get("objectives", ()))
        self._next = None
        for name in self._saved:
            start = getattr(type(self), f"_{name}")
            setattr(self, f"_{name}", type(start)(state.get(name, start)))


def choose(keep: Tensor, old: Memory, new: Memory) -> Memory:
    """The old memory where `keep` (scalar bool), else the new one; decided on the device."""
    keep = keep.to(next(iter(old.values())).device)
    return {name: torch.where(keep, value, new[name]) for name, value in old.items()}
