"""A source that changes another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..types import Balance, Group, Options, Role, Update, Weighting
from .source import Call, Source, Watch


class Wrapper(Source):
    """Does in every point as its `source`; `Every` and `Ema` change some of them."""

    source: Source | str

    @property
    def inner(self) -> Source:
        """The source that measures."""
        assert isinstance(self.source, Source)
        return self.source

    @property
    def measures_in_step(self) -> bool:
        """As the source."""
        return self.inner.measures_in_step

    def one_pass(self, names: tuple[str, ...]) -> bool:
        """As the source."""
        return self.inner.one_pass(names)

    def watch(self, options: Options) -> Watch | None:
        """As the source."""
        return self.inner.watch(options)

    def weigh(self, call: Call, weighting: Weighting, options: Options) -> Balance:
        """As the source."""
        return self.inner.weigh(call, weighting, options)

    def solve(
        self,
        groups: Mapping[Role, Sequence[Group]],
        names: tuple[str, ...],
        losses: Tensor,
        watch: Watch | None,
        weighting: Weighting,
        options: Options,
    ) -> Balance:
        """As the source."""
        return self.inner.solve(groups, names, losses, watch, weighting, options)

    def run(self, updates: Sequence[Update], balance: Balance, options: Options) -> Balance:
        """As the source."""
        return self.inner.run(updates, balance, options)

    def scale_free(self, options: Options) -> bool:
        """As the source."""
        return self.inner.scale_free(options)

    def unscale(self, record: Balance, scale: Tensor) -> Balance:
        """As the source."""
        return self.inner.unscale(record, scale)

    def commit(self, names: tuple[str, ...], balance: Balance) -> None:
        """As the source."""
        self.inner.commit(names, balance)

    def state_dict(self) -> dict[str, Any]:
        """What the source remembers, under "source"."""
        inner = self.inner.state_dict()
        return {"source": inner} if inner else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the source what it remembered."""
        self.inner.load_state_dict(state.get("source", {}))
