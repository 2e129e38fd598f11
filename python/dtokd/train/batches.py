"""Batches that can go on in the middle of an epoch, as if it had not been interrupted.

What a batch is depends on the order of the samples, which a random number at the beginning of the epoch decides; on
the generators of the process that decodes it, where the batches before it left them; and, with timm's random erasing,
on this process's. So these are noted on the way, and put back. The batches that were seen are not decoded again.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Sampler, get_worker_info

from .randomness import random_state, set_random_state


class Batches:
    """Torch's loader, as timm's PrefetchLoader holds one, that can go on in the middle of an epoch.

    Args:
        loader: over a data set with numbered samples; it is made anew, with the same settings.
        batch_sampler: other batches than the loader's.

    Effects: an iteration draws the same random numbers as one over the loader.
    """

    def __init__(self, loader: DataLoader[Any], batch_sampler: Any = None) -> None:
        if batch_sampler is None:
            batch_sampler = loader.batch_sampler
        self.batch_sampler, self.dataset = batch_sampler, loader.dataset
        self.sampler = getattr(batch_sampler, "sampler", batch_sampler)
        self.collate_fn = loader.collate_fn
        self._workers = loader.num_workers
        self._order, self._start = _Order(batch_sampler), _Start(loader.worker_init_fn)
        self._loader: DataLoader[Any] = DataLoader(
            loader.dataset,
            batch_sampler=self._order,
            num_workers=loader.num_workers,
            collate_fn=_Noting(loader.collate_fn),
            pin_memory=loader.pin_memory,
            worker_init_fn=self._start,
            # one that lived on would keep its generators beyond the epoch's checkpoint
            persistent_workers=False,
        )
        self._resumed: tuple[dict[str, Any], int, dict[str, Any]] | None = None
        self._begin: dict[str, Any] = {}
        self._before: dict[str, Any] = {}
        self._after: deque[tuple[int, str]] = deque()

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def state_dict(self, done: int) -> dict[str, Any]:
        """What `go_on` takes.

        Args:
            done: batches of this epoch that were used; timm's loader has taken the one after them as well.
        """
        after = [[number, state] for number, state in self._after if number < done]
        return {"begin": self._begin, "before": self._before, "workers": self._workers, "after": after}

    def go_on(self, state: dict[str, Any], done: int, now: dict[str, Any]) -> None:
        """Let the next iteration begin where another one was left.

        Args:
            state: of `state_dict(done)`.
            done: batches that it skips.
            now: the random state of this process when the other one was left.
        """
        self._resumed = state, done, now

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        state, done, now = self._resumed or ({}, 0, None)
        self._resumed = None
        self._after = deque(maxlen=self._workers + 1)
        if state:
            set_random_state(state["begin"])
            if state["workers"] == self._workers:
                self._after.extend((number, text) for number, text in state["after"])
        self._begin = random_state()
        # empty batches, so that each worker gets the batches of the one whose generators it takes over
        blanks = done % self._workers if self._workers else 0
        self._order.begin(done - blanks, blanks, state.get("before"))
        self._start.states = {number % self._workers: text for number, text in self._after} if self._workers else {}
        batches = iter(self._loader)
        self._start.states = {}
        for _ in range(blanks):
            next(batches)
        number = done
        while True:
            if now is not None and number == done + 1:
                set_random_state(now)
            self._before = state["before"] if state and number == done else random_state()
            try:
                images, targets, after = next(batches)
            except StopIteration:
                return
            self._after.append((number, after))
            number += 1
            yield images, targets


class _Order(Sampler[list[Any]]):
    """The batches of a sampler, but for the first ones."""

    def __init__(self, inner: Sampler[list[Any]]) -> None:
        self._inner = inner
        self.begin(0, 0, None)

    def begin(self, skip: int, blanks: int, before: dict[str, Any] | None) -> None:
        """Of the next iteration: how many are left out, how many are empty, and the random state of the first other."""
        self._skip, self._blanks, self._before = skip, blanks, before

    def __iter__(self) -> Iterator[list[Any]]:
        skip, blanks, before = self._skip, self._blanks, self._before
        for number, batch in enumerate(self._inner):
            if number < skip:
                continue
            if number < skip + blanks:
                yield []
                continue
            if before is not None:  # now, as the order was drawn from the generators of the epoch's beginning
                set_random_state(before)
                before = None
            yield batch


class _Noting:
    """A collation that returns the state of the generators after it, too."""

    def __init__(self, inner: Callable[[Any], Any]) -> None:
        self._inner = inner

    def __call__(self, batch: Sequence[Any]) -> tuple[Any, ...]:
        """Images, targets, and a worker's random state, as text: tensors would cost a file handle each."""
        if not batch:
            return ()
        collated = self._inner(batch)
        return (*collated, "" if get_worker_info() is None else json.dumps(random_state()))


class _Start:
    """Starts a worker, with the generators of another one."""

    def __init__(self, inner: Callable[[int], None] | None) -> None:
        self._inner = inner
        self.states: dict[int, str] = {}

    def __call__(self, worker: int) -> None:
        if self._inner is not None:
            self._inner(worker)
        if worker in self.states:
            set_random_state(json.loads(self.states[worker]))
