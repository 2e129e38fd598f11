"""What the user sees: a bar with the time left on a terminal, plain lines elsewhere; all lines are in `log.txt` too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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

#: Seconds after which a line comes in any case, also where `--log-interval` iterations take longer.
SILENCE = 30.0


class Progress:
    """Of a run.

    Args:
        epochs: how many it has.
        console: where to; default: standard output.
    """

    def __init__(self, epochs: int, console: Console | None = None) -> None:
        self.epochs = epochs
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._log: Path | None = None
        self._before: list[str] = []

    def say(self, text: str) -> None:
        """A line."""
        self.console.print(text, markup=False, emoji=False)
        self.note(text)

    def note(self, text: str) -> None:
        """A line for the log alone."""
        if self.console.quiet:
            return  # of another rank
        self._before.append(text)
        if self._log is not None:
            lines, self._before = self._before, []
            with self._log.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)

    def keep_in(self, log: Path) -> None:
        """Append all lines to this file, those so far first.

        Raises:
            OSError: it cannot be written.
        """
        self._log = log
        with log.open("a", encoding="utf-8"):
            pass

    @contextmanager
    def epoch(self, epoch: int, count: int, begin: int = 0) -> Iterator[_Epoch]:
        """One epoch's iterations, of which `begin` were done by an earlier process."""
        label = f"epoch {epoch + 1}/{self.epochs}"
        after = (self.epochs - epoch - 1) * count
        if not self.console.is_terminal:
            yield _Epoch(self, label, count, begin, after, None, None)
            return
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[told]}")]
        with Bar(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(label, total=count, completed=begin, told="")
            yield _Epoch(self, label, count, begin, after, bar, task)


class _Epoch:
    def __init__(self, progress: Progress, label: str, count: int, begin: int, after: int, bar: Any, task: Any) -> None:
        self._progress, self._label, self._count, self._bar, self._task = progress, label, count, bar, task
        self._begin, self._after = begin, after
        self._start = self._last = time.monotonic()

    def advance(self, done: int, images: int) -> None:
        """Move the bar; nothing is read from the device, so that losses come with `line` only."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif time.monotonic() - self._last > SILENCE:
            self._last = time.monotonic()
            self._progress.say(f"{self._label}  {done}/{self._count}  {self._speed(done, images)}")

    def line(self, done: int, losses: dict[str, float], lr: float, images: int) -> None:
        """Losses so far.

        Args:
            done: iterations of the epoch.
            losses: their means.
            lr: the learning rate.
            images: that this process, and the others beside it, have used in this epoch.
        """
        self._last = time.monotonic()
        text = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        text = f"{text}  lr {lr:.3g}  {self._speed(done, images)}"
        line = f"{self._label}  {done}/{self._count}  {text}"
        if self._bar is None or done == self._count:
            self._progress.say(line)
        else:
            self._bar.update(self._task, completed=done, told=text)
            self._progress.note(line)

    def _speed(self, done: int, images: int) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        here = done - self._begin
        told = f"{here / seconds:.3g} it/s  {images / seconds:.3g} img/s"
        if here < 2 < self._count:  # the first iteration is none to judge by
            return told
        left = (self._count - done) * seconds / here
        run = left + self._after * seconds / here
        if done < self._count:
            told += f"  {duration(left)} left"
        return told + (f"  {duration(run)} to the end" if self._after else "")


class Seldom:
    """Does a thing again only when at least twenty times as long has passed as it took the last time."""

    def __init__(self) -> None:
        self._due = 0.0

    def __call__(self, thing: Callable[[], object]) -> None:
        """Do it, or not yet."""
        start = time.monotonic()
        if start >= self._due:
            thing()
            self._due = start + 20 * (time.monotonic() - start)


def duration(seconds: float) -> str:
    """In two units.

    Example:
        >>> duration(3.4), duration(200), duration(5000), duration(200_000)
        ('3 s', '3 min 20 s', '1 h 23 min', '2 d 7 h')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for large, small, size, unit in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size} {large} {whole % size // unit} {small}"
    raise AssertionError
