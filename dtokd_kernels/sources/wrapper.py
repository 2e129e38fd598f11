"""A source that changes another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..plan import Step
from ..types import Balance, Options
from ..watch import Watch
from .source import Source


class Wrapper(Source):
    """Does as its `source`, but for `weigh` and `solve`; `Every` and `Ema` change more."""

    source: Source | str

    @property
    def inner(self) -> Source:
        """The source that measures."""
        assert isinstance(self.source, Source)
        return self.source

    @property
    def measures_in_step(self) -> bool:
        """Whether the source that measures needs `run`."""
        return self.inner.measures_in_step

    def one_pass(self, names: tuple[str, ...], params: Sequence[Tensor]) -> bool:
        """Whether the source that measures takes one full backward pass in the step that begins."""
        return self.inner.one_pass(names, params)

    def watch(self, options: Options) -> Watch | None:
        """What the source that measures has look at the gradients."""
        return self.inner.watch(options)

    def run(self, step: Step, balance: Balance, coefficients: Tensor) -> Balance:
        """The updates, by the source that measures."""
        return self.inner.run(step, balance, coefficients)

    def release(self) -> None:
        """Let the source that measures drop its graph."""
        self.inner.release()

    def commit(self, names: tuple[str, ...], balance: Balance) -> None:
        """Let the source that measures remember the step."""
        self.inner.commit(names, balance)

    def state_dict(self) -> dict[str, Any]:
        """What the source remembers, under "source"."""
        inner = self.inner.state_dict()
        return {"source": inner} if inner else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the source what it remembered."""
        self.inner.load_state_dict(state.get("source", {}))


def innermost(source: Source) -> Source:
    """The source that measures."""
    while isinstance(source, Wrapper):
        source = source.inner
    return source
