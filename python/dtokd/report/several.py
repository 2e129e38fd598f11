"""`dtokd report`: the page of one run, or one page on several runs."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..errors import UsageError
from ..files import write_text
from ..metric import is_lower_better, rank
from ..train.options import OUTSIDE
from .chart import line_chart
from .conclusion import read_baseline
from .html import document, fold, table
from .page import write_report
from .recorded import Recorded, listed

#: Options that name a run or a place: no difference between two runs.
_SAME = (*OUTSIDE, "data_dir", "device", "workers")


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
    baseline = None if options.baseline is None else read_baseline(options.baseline)
    folder = Path(os.path.commonpath([path.absolute().parent for path in options.run_dir]))
    target = options.output or folder / "runs.html"
    write_text(target, several(options.run_dir, baseline))
    print(target)
    return 0


def several(paths: Sequence[Path], baseline: Recorded | None) -> str:
    """One page on several runs: the best first, their curves in one figure, and in which options they differ."""
    runs = [Recorded.read(path, "dtokd report") for path in paths]
    metrics = {run.metric for run in runs}
    if len(metrics) > 1:
        raise UsageError(
            f"dtokd report: the runs are judged by {' and '.join(sorted(metrics))}; pass runs of one metric"
        )
    (metric,) = metrics
    names = _distinct(runs)
    runs = sorted(runs, key=lambda run: -rank(run.best()[1], is_lower_better(metric)))
    differing = _differing(runs)
    reference = math.nan if baseline is None else baseline.best(metric)[1]
    rows = [("run", "student", "teacher", "balance", metric, "to the baseline", "epochs", *differing)]
    for run in runs:
        value = run.best()[1]
        rows.append(
            (
                names[run.path],
                run.settings["model"],
                _text(run, "kd_model_name"),
                run.settings["kd_balance"],
                f"{value:.4g}",
                "" if math.isnan(reference) else f"{value - reference:+.4g}",
                f"{len(run.epochs['epoch'])} of {run.settings['epochs']}",
                *(_text(run, key) for key in differing),
            )
        )
    text = f"{len(runs)} runs; the best by {metric} is {names[runs[0].path]}: {runs[0].best()[1]:.4g}."
    if not math.isnan(reference) and baseline is not None:
        text += f" The baseline {baseline.name}, without a teacher, has {reference:.4g}."
    text += " One run each may differ by luck; dtokd compare measures whether it is more."
    curves = {names[run.path]: run.curve(run.prefix + metric) for run in runs}
    if baseline is not None:
        curves[f"baseline {baseline.name}"] = baseline.curve(baseline.prefix + metric)
    losses = {names[run.path]: run.curve("train_loss") for run in runs}
    charts = line_chart(f"Validation: {metric}", curves, "epoch") + line_chart("Training loss", losses, "epoch")
    parts = ["<h1>Runs</h1>", f"<p>{escape(text)}</p>", table(rows), f'<div class="grid-of">{charts}</div>']
    for run in runs:
        lines = [("what", "value"), *((str(i + 1), line) for i, line in enumerate(run.about.get("data", ())))]
        lines += [(part["name"], part["told"]) for part in run.models]
        parts.append(fold(f"{names[run.path]}: data and models", table(lines)))
    return document("Runs", parts)


def _distinct(runs: Sequence[Recorded]) -> dict[Path, str]:
    """The runs' names, with the folder before them where two are the same."""
    last = {run.path: run.path.absolute().name for run in runs}
    return last if len(set(last.values())) == len(runs) else {run.path: str(run.path) for run in runs}


def _differing(runs: Sequence[Recorded]) -> list[str]:
    """The options in which runs differ, but for those that the table shows anyway."""
    shown = ("model", "kd_model_name", "kd_balance", "epochs", *_SAME)
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in shown)
    return [key for key in keys if len({_text(run, key) for run in runs}) > 1]


def _text(run: Recorded, key: str) -> str:
    return " ".join(listed(run.settings.get(key)))
