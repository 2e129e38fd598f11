"""What the user sees: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)


class Progress:
    """Of a run.

    Args:
        epochs: how many it has.
        console: where to; default: standard output.
    """

    def __init__(self, epochs: int, console: Console | None = None) -> None:
        self.epochs = epochs
        self.console = console or Console(highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line."""
        self.console.print(text, markup=False)

    @contextmanager
    def epoch(self, epoch: int, count: int, begin: int = 0) -> Iterator[_Epoch]:
        """One epoch's iterations, of which `begin` were done by an earlier process."""
        label = f"epoch {epoch + 1}/{self.epochs}"
        if not self.console.is_terminal:
            yield _Epoch(self, label, count, begin, None, None)
            return
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[losses]}")]
        with Bar(*columns, console=self.console, transient=True) as bar:
            yield _Epoch(self, label, count, begin, bar, bar.add_task(label, total=count, completed=begin, losses=""))


class _Epoch:
    def __init__(self, progress: Progress, label: str, count: int, begin: int, bar: Any, task: Any) -> None:
        self._progress, self._label, self._count, self._bar, self._task = progress, label, count, bar, task
        self._begin = begin
        self._start = time.monotonic()

    def advance(self, done: int) -> None:
        """Move the bar; nothing is read from the device."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def line(self, done: int, losses: dict[str, float], lr: float) -> None:
        """Losses so far."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=done, losses=text)
            return
        rate = (done - self._begin) / max(time.monotonic() - self._start, 1e-9)
        left = (self._count - done) / rate
        self._progress.say(
            f"{self._label}  {done}/{self._count}  {text}  lr {lr:.3g}  {rate:.3g} it/s"
            + (f"  {left:.0f} s left" if done < self._count else "")
        )
