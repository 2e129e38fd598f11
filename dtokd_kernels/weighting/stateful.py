"""Weightings that remember: what a memory is, and how a skipped step leaves it alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

Memory = dict[str, Tensor]


class Stateful(ABC):
    """A weighting with a memory: a few small tensors that the optimizers save and restore.

    A subclass is two functions without side effects: `initial` makes the memory, `advance` returns the weights and
    the memory of the next step. Calling the weighting changes nothing yet. `commit` takes the next memory over,
    unless the step was skipped; `DTOAdamW`, `DTOSGD` and `backward` do that. Who calls `balance` does it himself.

    The memory is written in place, on the Gram's device and without reading it, so that a captured CUDA graph
    replays it. One object serves one optimizer.
    """

    _memory: Memory | None = None
    _next: Memory | None = None

    @abstractmethod
    def initial(self, gram: Tensor) -> Memory:
        """The memory before the first step: scalars and tensors [K] on the Gram's device."""

    @abstractmethod
    def advance(self, memory: Memory, gram: Tensor, losses: Tensor) -> tuple[Tensor, Memory]:
        """Weights [K] of this step, and the memory that the next one finds if this one is not skipped."""

    def __call__(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Weights of a Gram matrix of the gradients this weighting asks for.

        Args:
            gram: [K, K] float64. Where the weighting has `needs_gram = False` only its size and device matter.
            losses: [K] float64, the objectives' values.

        Returns:
            [K] float64.

        Raises:
            ValueError: the memory is of another number of objectives.
        """
        if self._memory is None:
            self._memory = self.initial(gram)
        for name, value in self._memory.items():
            if value.dim() == 1 and len(value) != len(gram):
                raise ValueError(
                    f"{type(self).__name__}: {name} remembers {len(value)} objectives, but there are {len(gram)}; "
                    "make a new weighting when the objectives change"
                )
            if value.device != gram.device:  # just loaded
                self._memory[name] = value.to(gram.device)
        weights, self._next = self.advance(self._memory, gram, losses)
        return weights

    def commit(self, skipped: Tensor) -> None:
        """Take over the memory that the last call proposed, once.

        Args:
            skipped: scalar bool: the step changes nothing, so the memory stays.
        """
        if self._memory is not None and self._next is not None:
            self._write(choose(skipped, self._memory, self._next))
        self._next = None

    def _write(self, new: Memory) -> None:
        assert self._memory is not None
        for name, value in new.items():
            self._memory[name].copy_(value)

    def state_dict(self) -> Memory:
        """A copy of the memory; empty before the first call."""
        return {name: value.clone() for name, value in (self._memory or {}).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned; from an empty one, start anew.

        Raises:
            ValueError: it is another weighting's state. Nothing has changed then.
        """
        expected = self.initial(torch.eye(1, dtype=torch.float64))
        if state and state.keys() != expected.keys():
            raise ValueError(
                f"{type(self).__name__}: the state has {sorted(state)}, expected {sorted(expected)}; it belongs to "
                "another weighting: load it into that one, or leave out the state dict's 'weighting'"
            )
        loaded = {name: state[name].to(like.dtype, copy=True) for name, like in expected.items() if state}
        self._memory = loaded or None
        self._next = None


def choose(keep: Tensor, old: Memory, new: Memory) -> Memory:
    """The old memory where `keep` (scalar bool), else the new one; decided on the device."""
    keep = keep.to(next(iter(old.values())).device)
    return {name: torch.where(keep, value, new[name]) for name, value in old.items()}
