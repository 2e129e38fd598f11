"""What a run has come to, in sentences: against its teacher and its baseline, and which objective has the weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..metric import best_of, is_lower_better
from .columns import read_columns

Columns = Mapping[str, list[float]]
#: Of the weight, from here on the sentence warns that the other objectives are hardly trained.
NEARLY_ALL = 0.95


@dataclass(frozen=True)
class Baseline:
    """A run of the same student without a teacher.

    Attributes:
        name: of its directory.
        epochs: its `summary.csv`, by column.
        prefix: of its columns that judge: "eval_", or "eval_ema_".
    """

    name: str
    epochs: Columns
    prefix: str


def read_baseline(run: Path, command: str) -> Baseline:
    """Of a run's directory.

    Raises:
        UsageError: it is none, it has a teacher, or no epoch of it is finished.
    """
    from ..settings import settings_of

    settings = settings_of(run, command)
    if settings.get("kd_model_name"):
        raise UsageError(
            f"--baseline: {run} was distilled from {settings['kd_model_name']}; pass a run without a teacher"
        )
    epochs = read_columns(run / "summary.csv", ("epoch",))
    if not epochs:
        raise UsageError(f"--baseline: {run} has no finished epoch yet")
    return Baseline(run.name, epochs, prefix_of(settings))


def prefix_of(settings: Mapping[str, Any]) -> str:
    """Of the columns of `summary.csv` by which a run is judged."""
    return "eval_ema_" if settings.get("model_ema") else "eval_"


def best_value(epochs: Columns, prefix: str, metric: str) -> float:
    """A run's best value of a metric; NaN where it has none."""
    values = epochs.get(prefix + metric)
    return values[best_of(values, is_lower_better(metric))] if values else math.nan


def sentences(
    settings: Mapping[str, Any], epochs: Columns, about: Mapping[str, Any], baseline: Baseline | None
) -> Iterator[str]:
    """The conclusion, as far as it can be drawn."""
    metric = settings["eval_metric"]
    own = best_value(epochs, prefix_of(settings), metric)
    if not math.isnan(own):
        if baseline is not None and not math.isnan(other := best_value(baseline.epochs, baseline.prefix, metric)):
            better = own < other if is_lower_better(metric) else own > other
            how = "better than" if better else "as good as" if own == other else "worse than"
            yield (
                f"The student is {how} its baseline {baseline.name}, trained without a teacher: {metric} {own:.4g} "
                f"against {other:.4g}. One run each may differ by luck; dtokd compare tells whether it is more."
            )
        for teacher in about.get("teachers", ()):
            value = (teacher.get("metrics") or {}).get(metric)
            if isinstance(value, (int, float)):
                better = own < value if is_lower_better(metric) else own > value
                how = "better than" if better else "as good as" if own == value else "not as good as"
                yield f"It is {how} the teacher {teacher['name']}: {metric} {own:.4g} against {value:.4g}."
            if warning := teacher.get("warning"):
                yield f"Warning: {warning}."
    weights = {n.removeprefix("weight_"): v[-1] for n, v in epochs.items() if n.startswith("weight_")}
    total = sum(abs(value) for value in weights.values())
    if len(weights) > 1 and total > 0:  # not with NaN
        name, most = max(((name, abs(value) / total) for name, value in weights.items()), key=lambda item: item[1])
        text = f"The objective {name} has the most weight, {most:.0%} in the mean over the last epoch"
        yield text + ("; the others are hardly trained." if most >= NEARLY_ALL else ".")
    seconds, share = epochs.get("iteration_seconds"), epochs.get("teacher_seconds")
    if seconds and share and seconds[-1] > 0 and share[-1] > 0:
        yield f"The teacher takes {min(share[-1] / seconds[-1], 1):.0%} of an iteration's time."
