"""`dtokd report`: the page of one run, or one page on several runs."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import write_text
from ..metric import is_lower_better
from ..train.about import read_about
from ..train.options import OUTSIDE
from .chart import line_chart
from .columns import read_columns
from .conclusion import Baseline, best_value, prefix_of, read_baseline
from .page import document, fold, table, write_report

#: Options that name a run, or say where something is: no difference between two runs.
_SAME = (*OUTSIDE, "data_dir", "device", "workers")


@dataclass(frozen=True)
class _Run:
    path: Path
    settings: dict[str, Any]
    epochs: dict[str, list[float]]
    about: dict[str, Any]

    def best(self, metric: str) -> float:
        return best_value(self.epochs, prefix_of(self.settings), metric)


def run(options: argparse.Namespace) -> int:
    """Write the page, and print its path.

    Raises:
        UsageError: a directory holds no run with a finished epoch, or the runs are judged by different metrics.
    """
    if len(options.run_dir) == 1:
        if options.output is not None:
            raise UsageError("--output: the page of one run is in its directory; pass several runs, or no --output")
        print(write_report(options.run_dir[0], options.baseline))
        return 0
    baseline = None if options.baseline is None else read_baseline(options.baseline, "dtokd report")
    folder = Path(os.path.commonpath([path.absolute().parent for path in options.run_dir]))
    target = options.output or folder / "runs.html"
    write_text(target, several(options.run_dir, baseline))
    print(target)
    return 0


def several(paths: Sequence[Path], baseline: Baseline | None) -> str:
    """One page on several runs: the best first, their curves in one figure, and in which options they differ."""
    runs = [_read(path) for path in paths]
    metrics = {run.settings["eval_metric"] for run in runs}
    if len(metrics) > 1:
        raise UsageError(
            f"dtokd report: the runs are judged by {' and '.join(sorted(metrics))}; pass runs of one metric"
        )
    (metric,) = metrics
    lower = is_lower_better(metric)
    names = _distinct(runs)

    def rank(run: _Run) -> tuple[bool, float]:
        value = run.best(metric)
        return math.isnan(value), value if lower else -value

    runs = sorted(runs, key=rank)
    differing = _differing([run.settings for run in runs])
    reference = math.nan if baseline is None else best_value(baseline.epochs, baseline.prefix, metric)
    rows = [("run", "student", "teacher", "balance", metric, "to the baseline", "epochs", *differing)]
    for each in runs:
        value = each.best(metric)
        rows.append(
            (
                names[each.path],
                each.settings["model"],
                _text(each.settings.get("kd_model_name")),
                each.settings["kd_balance"],
                f"{value:.4g}",
                "" if math.isnan(reference) else f"{value - reference:+.4g}",
                f"{len(each.epochs['epoch'])} of {each.settings['epochs']}",
                *(_text(each.settings.get(key)) for key in differing),
            )
        )
    best = runs[0]
    text = f"{len(runs)} runs; the best by {metric} is {names[best.path]}: {best.best(metric):.4g}."
    if not math.isnan(reference) and baseline is not None:
        text += f" The baseline {baseline.name}, without a teacher, has {reference:.4g}."
    text += " One run each may differ by luck; dtokd compare tells whether it is more."
    curves = {names[run.path]: _curve(run.epochs, prefix_of(run.settings) + metric) for run in runs}
    if baseline is not None:
        curves[f"baseline {baseline.name}"] = _curve(baseline.epochs, baseline.prefix + metric)
    losses = {names[run.path]: _curve(run.epochs, "train_loss") for run in runs}
    charts = line_chart(f"Validation: {metric}", curves, "epoch") + line_chart("Training loss", losses, "epoch")
    parts = ["<h1>Runs</h1>", f"<p>{escape(text)}</p>", table(rows), f'<div class="grid-of">{charts}</div>']
    for each in runs:
        lines = [("what", "value"), *((str(i + 1), line) for i, line in enumerate(each.about.get("data", ())))]
        lines += [(part["name"], part["told"]) for part in _models(each.about)]
        parts.append(fold(f"{names[each.path]}: data and models", table(lines)))
    return document("Runs", parts)


def _read(path: Path) -> _Run:
    from ..settings import settings_of

    settings = settings_of(path, "dtokd report")
    epochs = read_columns(path / "summary.csv", ("epoch",))
    if not epochs:
        raise UsageError(f"dtokd report: {path} has no finished epoch yet")
    return _Run(path, settings, epochs, read_about(path))


def _models(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [part for part in (about.get("student"), *about.get("teachers", ())) if part]


def _distinct(runs: Sequence[_Run]) -> dict[Path, str]:
    """The runs' names, with the folder before them where two are the same."""
    last = [run.path.absolute().name for run in runs]
    if len(set(last)) == len(last):
        return {run.path: name for run, name in zip(runs, last, strict=True)}
    return {run.path: str(run.path) for run in runs}


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options in which runs differ, but for those that the table shows anyway."""
    shown = ("model", "kd_model_name", "kd_balance", "epochs", *_SAME)
    keys = dict.fromkeys(key for each in settings for key in each if key not in shown)
    return [key for key in keys if len({_text(each.get(key)) for each in settings}) > 1]


def _curve(epochs: Mapping[str, list[float]], column: str) -> list[tuple[float, float]]:
    return [(epoch + 1, value) for epoch, value in zip(epochs["epoch"], epochs.get(column, ()), strict=False)]


def _text(value: Any) -> str:
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
