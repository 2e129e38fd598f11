"""Ctrl-C and SIGTERM, which end a run between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .world import under_torchrun


class Stopped(Exception):
    """A signal that ends the process, between two steps.

    Attributes:
        signal: its number.
        batches: those of this epoch that were used.
        means: the losses so far, for `Engine.train_epoch`.
    """

    def __init__(self, signal: int, batches: int = 0, means: dict[str, Any] | None = None) -> None:
        super().__init__(f"signal {signal}")
        self.signal, self.batches, self.means = signal, batches, means


@contextmanager
def signals() -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM is noted in the list, a second one ends the process as usual.

    Not under torchrun: it sends on the signal that a terminal gives to all, and ends us itself if we take too long.
    """
    noted = [0]
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        noted[0] = number
        if not under_torchrun():
            for each, handler in before.items():
                signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
