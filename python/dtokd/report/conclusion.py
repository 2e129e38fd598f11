"""What a run has come to, in sentences: against its teacher and its baseline, and which objective has the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from ..datafree.options import BESIDES
from ..errors import UsageError
from ..lopsided import NEARLY_ALL
from ..metric import is_lower_better
from .recorded import Recorded, metric_of


def read_baseline(path: Path) -> Recorded:
    """A run of the same student without a teacher.

    Raises:
        UsageError: it is no run, it has a teacher, or no epoch of it is finished.
    """
    run = Recorded.read(path, "--baseline")
    if teacher := run.settings.get("kd_model_name"):
        raise UsageError(f"--baseline: {path} was distilled from {teacher}; pass a run without a teacher")
    return run


def sentences(run: Recorded, baseline: Recorded | None) -> Iterator[str]:
    """The conclusion, as far as it can be drawn."""
    metric, (_, own) = run.metric, run.best()

    def compared(other: float, worse: str) -> str:
        better = own < other if is_lower_better(metric) else own > other
        return "better than" if better else "as good as" if own == other else worse

    if not math.isnan(own):
        if baseline is not None and not math.isnan(other := baseline.best(metric)[1]):
            yield (
                f"The student is {compared(other, 'worse than')} its baseline {baseline.name}, trained without a "
                f"teacher: {metric} {own:.4g} against {other:.4g}. One run each may differ by luck; dtokd compare "
                "measures whether it is more."
            )
        for teacher in run.teachers:
            if (value := metric_of(teacher, metric)) is not None:
                how = compared(value, "not as good as")
                yield f"It is {how} the teacher {teacher['name']}: {metric} {own:.4g} against {value:.4g}."
            if warning := teacher.get("warning"):
                yield f"Warning: {warning}."
    # not the weights: those of gradients of unlike lengths tell little of what the update is made of
    shares = {n.removeprefix("share_"): v[-1] for n, v in run.epochs.items() if n.startswith("share_")}
    if len(shares) > 1 and all(map(math.isfinite, shares.values())):
        name, most = max(shares.items(), key=lambda item: item[1])
        text = f"The objective {name} has the largest share of the gradient, {most:.0%} in the mean over the last epoch"
        yield text + ("; the others are hardly trained." if most >= NEARLY_ALL else ".")
    seconds, share = run.epochs.get("iteration_seconds"), run.epochs.get("teacher_seconds")
    if seconds and share and seconds[-1] > 0 and share[-1] > 0:
        besides = BESIDES if run.settings.get("data_free") else ""
        yield f"The teacher takes {min(share[-1] / seconds[-1], 1):.0%} of an iteration's time{besides}."
