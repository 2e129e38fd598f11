"""Which of two evaluations is better; one that is NaN is worse than any number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def is_lower_better(name: str) -> bool:
    """Of a metric's name, such as "top1", "ap" or "ema_loss"."""
    return name.endswith("loss")


def chosen_by(options: Any) -> str:
    """The metric that the best epoch is chosen by, by the options of `dtokd train`: of the average, if there is one."""
    return f"ema_{options.eval_metric}" if options.model_ema else str(options.eval_metric)


def rank(value: float, lower: bool) -> float:
    """A number that is greater for a better value, minus infinity for NaN.

    Example:
        >>> rank(0.5, lower=True) < rank(0.25, lower=True)
        True
    """
    return -math.inf if math.isnan(value) else -value if lower else value


def replaces(value: float, best: float | None, lower: bool) -> bool:
    """Whether an epoch takes the place of the best one before it.

    The first of equal ones stays; of epochs that are all NaN the last one counts, which has learned longest.
    """
    return best is None or math.isnan(best) or rank(value, lower) > rank(best, lower)


def best_of(values: Sequence[float], lower: bool) -> int:
    """The index that is left when each value in turn `replaces` the best one before it; there is at least one."""
    best = 0
    for index, value in enumerate(values):
        if replaces(value, values[best], lower):
            best = index
    return best
