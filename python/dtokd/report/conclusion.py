"""What a run has come to, in sentences: against its teacher and its baseline, and which objective has the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from ..datafree.options import BESIDES
from ..errors import UsageError
from ..lopsided import NEARLY_ALL
from ..metric import is_lower_better
from ..train.options import OUTSIDE, flag
from .recorded import Recorded, metric_of

#: In which a run and its baseline may differ: what has no part in the comparison, or is of the teacher.
_FREE = (
    *(*OUTSIDE, "data_dir", "device", "seed", "data_seed", "validation_batch_size", "pin_mem", "pictures"),
    *("torchcompile", "torchcompile_mode", "task_loss_weight", "distill_loss_weight", "opt"),
)


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
            if others := _others(run, baseline):
                yield f"They also differ in {', '.join(others)}, which may be the reason."
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


def _others(run: Recorded, baseline: Recorded) -> list[str]:
    """The options in which two runs differ, besides those of the teacher and the balance."""
    pairs = [(key, value, baseline.settings[key]) for key, value in run.settings.items() if key in baseline.settings]
    named = [
        flag(key)
        for key, own, other in pairs
        if own != other and key not in _FREE and not key.startswith(("kd_", "df_", "data_free"))
    ]
    names = [str(settings.get("opt", "")).lower().removeprefix("dto") for settings in (run.settings, baseline.settings)]
    return [*named, "--opt"] if names[0] != names[1] else named
