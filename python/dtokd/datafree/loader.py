"""The student's batches: made in between, kept in the bank, drawn from it; and what is noted of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Diverged, UsageError
from ..monitor import CSV, BalanceLogger, Row, means_of
from ..train.signals import Stopped
from .augment import Augment
from .bank import Bank
from .pictures import write_pictures
from .synthesis import Settings, Synthesis, judging

#: Images in a picture.
SHOWN = 40


class SyntheticBatches:
    """An epoch's batches of images and the teacher's classes of them: what `Engine` takes for a loader.

    The images of a batch are drawn from the bank with replacement, shifted and flipped at random. A label is the class
    that the teacher gives the image, not the one that it was made for.

    Args:
        synthesis: makes images.
        settings: of them.
        bank: keeps them.
        student: in its training mode; while images are made it is judged as it is.
        label: from normalised images to the teacher's logits.
        augment: of the student's images.
        count: batches in an epoch.
        batch_size: of the student.
        every: batches from one call of `synthesis` to the next.
        warmup: such calls before the first batch of all.
        balance: the text of --df-balance, for messages.
        say: takes a line on what is going on.

    Attributes:
        steps: of the maker's optimizer.
        watch: a context around the making of each batch of images, such as a `Stopwatch`.
        warmup: see above.
    """

    def __init__(
        self,
        synthesis: Synthesis,
        settings: Settings,
        bank: Bank,
        student: nn.Module,
        label: Callable[[Tensor], Tensor],
        augment: Augment,
        *,
        count: int,
        batch_size: int,
        every: int,
        warmup: int,
        balance: str,
        say: Callable[[str], None],
    ) -> None:
        self.synthesis, self.settings, self.bank = synthesis, settings, bank
        self._student, self._label, self._augment = student, label, augment
        self._count, self._batch_size, self._every, self.warmup = count, batch_size, every, warmup
        self._balance, self._say = balance, say
        self._begin = 0
        self._log: BalanceLogger | None = None
        self._stopped: Callable[[], int] = lambda: 0
        self._rows: list[Row] = []
        self.steps = 0
        self.watch: Any = nullcontext()
        self.dataset = _Described(count * batch_size)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        begin, self._begin = self._begin, 0
        if not len(self.bank):
            self._say(f"making the first {self.warmup} batches of {self.settings.batch} images")
            for _ in range(self.warmup):
                if signal := self._stopped():
                    raise Stopped(signal)
                self.make()
        for index in range(begin, self._count):
            if index % self._every == 0:
                self.make()
            pixels, labels = self.bank.sample(self._batch_size)
            yield self._augment(self.settings.normalise(pixels)), labels

    def makings(self, batches: int) -> int:
        """How often new images are made in so many batches from the beginning of an epoch."""
        return -(-batches // self._every)

    def make(self) -> None:
        """Add a batch of new images to the bank.

        Raises:
            Diverged: see `Synthesis.make`.
            UsageError: the weighting refuses a loss.
        """
        try:
            with self.watch, judging(self._student):
                pixels, _ = self.synthesis.make(self._watch)
                with torch.no_grad():
                    labels = self._label(self.settings.normalise(pixels)).argmax(-1)
        except Diverged:
            raise
        except ValueError as error:  # of the balance, such as a loss below 0
            raise UsageError(f"--df-balance {self._balance}: {error}") from error
        self.bank.add(pixels, labels)

    def _watch(self, balance: Any, losses: dict[str, Tensor]) -> None:
        self.steps += 1
        if self._log is not None:
            self._log.log(balance, **{f"loss_{name}": loss for name, loss in losses.items()})

    @contextmanager
    def attached(self, path: Path, stopped: Callable[[], int]) -> Iterator[None]:
        """While this goes on, note the maker's steps in a file of the run.

        Args:
            path: of the file; it holds the lines of the steps until now.
            stopped: the number of the signal that ends the run, or 0; asked between the first batches of images.
        """
        self._stopped = stopped
        with BalanceLogger([CSV(path, append=True), self], every=100, step=self.steps) as self._log:
            yield
        self._log = None

    def write(self, rows: Any, means: Any) -> None:
        """Keep the rows of some steps (as a `monitor.Sink`)."""
        self._rows.extend(rows)

    def close(self) -> None:
        """Nothing: there is no file to close."""

    def take(self) -> Row:
        """The means of the maker's steps since the last call, for `summary.csv`; they are forgotten."""
        self._flush()
        rows, self._rows = self._rows, []
        if not rows:
            return {}
        means = {name: value for name, value in means_of(rows).items() if name != "step"}
        for name in means:  # a step whose disagreement has no gradient has no cosine with it
            known = [row[name] for row in rows if name in row and math.isfinite(row[name])]
            means[name] = sum(known) / len(known) if known and math.isnan(means[name]) else means[name]
        return {f"df_{name}": value for name, value in means.items()}

    def _flush(self) -> None:
        if self._log is not None:
            self._log.flush()

    def draw(self, path: Path) -> None:
        """Write a picture of the newest images into this file."""
        write_pictures(path, *self.bank.newest(SHOWN))

    def state_dict(self, done: int = 0) -> dict[str, Any]:
        """Where the loader is; the images are in `whole_state`.

        Args:
            done: batches of this epoch that were used.
        """
        return {"done": done}

    def go_on(self, state: dict[str, Any], done: int, now: dict[str, Any]) -> None:
        """Let the next iteration begin after so many batches."""
        self._begin = done

    def whole_state(self) -> dict[str, Any]:
        """All that later batches depend on, besides the student and torch's random generator."""
        self._flush()
        columns = list(self._rows[0]) if self._rows else []
        table = torch.tensor([list(row.values()) for row in self._rows], dtype=torch.float64)
        return {
            "synthesis": self.synthesis.state_dict(),
            "bank": self.bank.state_dict(),
            "steps": self.steps,
            "rows": {"columns": columns, "values": table},
        }

    def load_whole_state(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: it is of other images.
        """
        self.bank.load_state_dict(state["bank"])
        self.synthesis.load_state_dict(state["synthesis"])
        self.steps = state["steps"]
        columns, values = state["rows"]["columns"], state["rows"]["values"]
        self._rows = [dict(zip(columns, row, strict=True)) for row in values.tolist()] if columns else []


class _Described:
    """What the loop asks of a data set."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def identity(self) -> str:
        """The images are a part of the checkpoint, so nothing outside of it tells them apart."""
        return "synthetic"
