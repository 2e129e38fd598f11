"""What a run's directory tells of the run, for pages, cards and comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..metric import best_of, is_lower_better
from ..settings import settings_of
from ..texts import read_notes
from ..train.about import ABOUT
from .columns import read_columns

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Recorded:
    """A run of `dtokd train` or `dtokd detect` with a finished epoch.

    Attributes:
        path: its directory.
        settings: its options.
        epochs: its `summary.csv`, by column.
        about: its `about.json`.
    """

    path: Path
    settings: Mapping[str, Any]
    epochs: Mapping[str, Sequence[float]]
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, command: str, columns: Sequence[str] = ("epoch",)) -> Recorded:
        """Read a run's directory.

        Args:
            path: the directory.
            command: that reads it, or the option that names it, for messages.
            columns: that `summary.csv` has in any case.

        Raises:
            UsageError: it is no run directory, no epoch is finished, or a file of it is damaged.
        """
        settings = settings_of(path, command)
        epochs = read_columns(path / "summary.csv", columns)
        if not epochs:
            raise UsageError(f"{command}: {path} has no finished epoch yet")
        return cls(path, settings, epochs, read_notes(path / ABOUT))

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @property
    def metric(self) -> str:
        """The metric by which the best epoch is chosen."""
        return str(self.settings["eval_metric"])

    @property
    def prefix(self) -> str:
        """The begin of the columns of `summary.csv` that judge the student, or its average where there is one."""
        return "eval_ema_" if self.settings.get("model_ema") else "eval_"

    def best(self, metric: str | None = None) -> tuple[int, float]:
        """The index of the best epoch by a metric, default `metric`, and its value; 0 and NaN without evaluations."""
        metric = metric or self.metric
        values = self.epochs.get(self.prefix + metric)
        if not values:
            return 0, math.nan
        index = best_of(values, is_lower_better(metric))
        return index, values[index]

    def curve(self, column: str) -> Points:
        """A column over the epochs, which are counted from 1."""
        return [(epoch + 1, v) for epoch, v in zip(self.epochs["epoch"], self.epochs.get(column, ()), strict=False)]

    @property
    def teachers(self) -> list[Mapping[str, Any]]:
        """What is known of each teacher; a name that several have gets a number."""
        found = list(self.about.get("teachers", ()))
        names = [teacher["name"] for teacher in found]
        numbered = [
            f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)
        ]
        return [{**teacher, "name": name} for teacher, name in zip(found, numbered, strict=True)]

    @property
    def models(self) -> list[Mapping[str, Any]]:
        """What is known of the student and the teachers."""
        return [part for part in (self.about.get("student"), *self.teachers) if part]


def listed(value: Any) -> list[str]:
    """An option's value or values as texts; none for an option that is not given."""
    return [str(item) for item in value] if isinstance(value, list) else [] if value in (None, "") else [str(value)]


def metric_of(teacher: Mapping[str, Any], metric: str) -> float | None:
    """A teacher's metric on the validation split, where it was measured."""
    value = (teacher.get("metrics") or {}).get(metric)
    return float(value) if isinstance(value, (int, float)) else None
