"""`report.html`: one file with all that a run directory tells, for a screen of any size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import write_text
from ..texts import read_json, read_notes
from ..train.images import skipped
from .chart import line_chart
from .classes import classes_part
from .columns import over_steps, read_columns
from .conclusion import read_baseline, sentences
from .html import document, fold, pictures, table
from .recorded import Points, Recorded, listed, metric_of
from .synthetic import synthetic_part


def write_report(path: Path, baseline: Path | None = None) -> Path:
    """Write the page of a run directory into it.

    Args:
        path: what `dtokd train` wrote.
        baseline: a run of the same student without a teacher; default: the one that the run's options name.

    Returns:
        The page's path.

    Raises:
        UsageError: it is no run directory, no epoch is finished, or a file of it is damaged.
    """
    run = Recorded.read(path, "dtokd report", ("epoch", "lr"))
    steps = read_columns(path / "steps.csv", ("step",))
    environment = _read_environment(path / "environment.json")
    named = baseline or run.settings.get("baseline")
    base = None if named is None else read_baseline(Path(named))
    known = ("; ".join(run.about.get("data", ())), "; ".join(part["told"] for part in run.models))
    parts = [
        f"<h1>{escape(run.name)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in (_headline(run), *sentences(run, base), *known) if line),
        f'<div class="grid-of">{"".join(_charts(run, steps, _beside(run, base)))}</div>',
        classes_part(read_notes(path / "classes.json")),
        pictures(path / "pictures", "Validation images, best student"),
        synthetic_part(path),
    ]
    if names := skipped(path / "bad_images.txt"):
        parts += [f"<h2>{len(names)} skipped images</h2>", table([("image",), *((name,) for name in names)])]
    # what concludes is above, what one looks up is folded
    epochs = [tuple(f"{value:.5g}" for value in row) for row in zip(*run.epochs.values(), strict=True)]
    options = [(key, " ".join(listed(value))) for key, value in run.settings.items() if value not in (None, "", {})]
    found = [(key, str(value)) for key, value in environment.items()]
    parts += [
        fold("Epochs", table([tuple(run.epochs), *epochs])),
        fold("Settings", table([("option", "value"), *options])),
        fold("Environment", table([("what", "value"), *found])),
    ]
    write_text(path / "report.html", document(run.name, parts))
    return path / "report.html"


def _read_environment(path: Path) -> dict[str, Any]:
    try:
        held = read_json(path) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}; remove it, and the report is written without it") from error
    return held if isinstance(held, dict) else {}


def _headline(run: Recorded) -> str:
    settings = run.settings
    teacher, kind = (", ".join(listed(settings.get(key))) for key in ("kd_model_name", "kd_distill_type"))
    what = f"Student {settings['model']}"
    what += f", teacher {teacher} ({kind}), balance {settings['kd_balance']}" if teacher else ""
    done = f"{len(run.epochs['epoch'])} finished epochs"
    name = (run.prefix + run.metric).removeprefix("eval_")
    if f"eval_{name}" not in run.epochs:
        return f"{what}. {done}."
    best, value = run.best()
    if math.isnan(value):
        return f"{what}. {done}; {name} is nan in all of them, so none is the best."
    return f"{what}. {done}; best {name} {value:.4g} in epoch {run.epochs['epoch'][best] + 1:.0f}."


def _beside(run: Recorded, base: Recorded | None) -> dict[str, Points]:
    """Lines to compare the student's metric with: the baseline's, and each teacher's, the same in all epochs."""
    metric, lines = run.metric, {}
    if base is not None:
        lines[f"baseline {base.name}: {metric}"] = base.curve(base.prefix + metric)
    ends = (run.epochs["epoch"][0] + 1, run.epochs["epoch"][-1] + 1)
    for teacher in run.teachers:
        if (value := metric_of(teacher, metric)) is not None:
            lines[f"teacher {teacher['name']}: {metric}"] = [(end, value) for end in ends]
    return lines


def _charts(run: Recorded, steps: Mapping[str, Sequence[float]], beside: Mapping[str, Points]) -> Iterable[str]:
    def over_epochs(begin: str, label: str = "") -> dict[str, Points]:
        return {f"{label}{name.removeprefix(begin)}": run.curve(name) for name in run.epochs if name.startswith(begin)}

    def compared(part: str) -> dict[str, Points]:
        return {name: points for name, points in beside.items() if f": {part}" in name}

    evaluated = over_epochs("eval_")
    accuracy = {name: points for name, points in evaluated.items() if "top" in name}
    yield line_chart("Accuracy, validation, percent", accuracy | compared("top"), "epoch")
    precision = {name: points for name, points in evaluated.items() if name.removeprefix("ema_").startswith("ap")}
    yield line_chart("COCO's average precision, validation", precision | compared("ap"), "epoch")
    yield line_chart("Errors: points of AP50 each kind costs (paper: Fig. 4)", over_epochs("eval_error_"), "epoch")
    losses = over_epochs("train_", "training: ")
    losses |= {f"validation: {name}": points for name, points in evaluated.items() if name.endswith("loss")}
    yield line_chart("Losses", losses | compared("loss"), "epoch")
    yield line_chart("Weights, mean over the epoch (paper: Fig. 3)", over_epochs("weight_"), "epoch")
    if steps:
        yield line_chart(
            "Conflict: cosine of the gradients (Fig. 1)", over_steps(steps, "cosine_"), "iteration", mark=0
        )
        norms = over_steps(steps, "norm_")
        if "dominance" in steps:
            title = "Dominance: ratio of the gradients' norms (Fig. 1)"
            ratio = {"{1} / {0}".format(*norms): over_steps(steps, "dominance")[""]}
            yield line_chart(title, ratio, "iteration", log=True, mark=1)
        yield line_chart("Norms of the gradients", norms, "iteration", log=True)
    rates = {name: run.curve(name) for name in run.epochs if name.endswith("_rate")}
    yield line_chart("Share of iterations: in conflict, at a vertex, skipped", rates, "epoch")
    yield line_chart("Learning rate", {"lr": run.curve("lr")}, "epoch")
