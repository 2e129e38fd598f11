"""`report.html` of a comparison: the verdict, the table, and the arms' curves side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from ..files import write_text
from ..report.chart import line_chart
from ..report.html import document, table
from .arms import NONE
from .plan import Run
from .verdict import Setting, Verdict, notes, rows_of

Curve = list[tuple[float, float]]


def write_page(folder: Path, verdict: Verdict, setting: Setting, runs: Sequence[Run]) -> Path:
    """Write the page into the comparison's folder.

    Args:
        folder: of the comparison.
        verdict, setting: what it found, and of what.
        runs: all of them.

    Returns:
        Its path.
    """
    arms = [line.arm.text for line in verdict.lines]
    ordered = {arm: [run.columns for run in runs if run.arm == arm] for arm in arms}
    parts = [
        f"<h1>{escape(folder.name)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in verdict.text),
        table(rows_of(verdict, setting)),
        *(f"<p>{escape(note)}</p>" for note in notes(setting)),
        f'<div class="grid-of">{"".join(_charts(ordered, setting))}</div>',
    ]
    write_text(folder / "report.html", document(folder.name, parts))
    return folder / "report.html"


def _charts(arms: Mapping[str, Sequence[Mapping[str, list[float]]]], setting: Setting) -> Iterable[str]:
    def of(name: str) -> dict[str, Curve]:
        return {arm: mean_curve(several, name) for arm, several in arms.items()}

    judged = of(f"eval_{setting.metric}")
    yield line_chart(f"{setting.metric} of {setting.chooses}, mean over the seeds", judged, "epoch")
    bare = dict(judged.get(NONE, []))
    gains = {
        arm: [(epoch, value - bare[epoch]) for epoch, value in points if epoch in bare and arm != NONE]
        for arm, points in judged.items()
    }
    yield line_chart(f"Difference in {setting.metric} to no teacher", gains, "epoch", mark=0)
    yield line_chart("Task loss in training", of("train_task"), "epoch")
    yield line_chart("Loss in the evaluation", of("eval_loss"), "epoch")
    names = dict.fromkeys(key for several in arms.values() for run in several for key in run)
    for name in names:
        if name.startswith("share_"):
            yield line_chart(f"Share of the gradient: {name.removeprefix('share_')}", of(name), "epoch")
    yield line_chart("Iterations in which gradients point apart", of("conflict_rate"), "epoch")
    yield line_chart("Iterations with a weight of 0", of("vertex_rate"), "epoch")


def mean_curve(runs: Sequence[Mapping[str, list[float]]], name: str) -> Curve:
    """Over several runs, of the epochs that all of them have; epochs are counted from 1."""
    values = [run[name] for run in runs if name in run]
    if not values or len(values) < len(runs):
        return []
    return [
        (epoch + 1.0, math.fsum(several) / len(several)) for epoch, several in enumerate(zip(*values, strict=False))
    ]
