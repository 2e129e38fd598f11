"""What the demo found: a table, what it means, a picture, and the numbers behind them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from torch import Tensor

from .agreement import Agreement
from .train import History

#: Colors that people with any color vision tell apart (Okabe and Ito, 2008).
STYLES: dict[str, dict[str, Any]] = {
    "sum": {"color": "#999999"},
    "log-sum": {"color": "#56B4E9", "linestyle": "--"},
    "dto": {"color": "#D55E00", "linewidth": 2.5},
    "dto-reference": {"color": "#000000", "linestyle": ":"},
}


#: Curves that are drawn, and the titles of their panels.
PANELS = {
    "distill_weight": "weight of distillation",
    "cosine": "cosine between the gradients; below 0: conflict",
    "dominance": "dominance, |g distill| / |g task|",
}
#: Curves whose means stand in the results, and under which name.
MEANS = {
    "conflict": "conflict_rate",
    "vertex": "vertex_rate",
    "task_weight": "task_weight",
    "distill_weight": "distill_weight",
}
#: Columns of the printed table: of the results, its heading, format.
COLUMNS = (
    ("accuracy", "accuracy\n", ".1%"),
    ("conflict_rate", "conflict\nrate", ".0%"),
    ("vertex_rate", "vertex\nrate", ".0%"),
    ("task_weight", "weight\ntask", ".2f"),
    ("distill_weight", "weight\ndistill", ".2f"),
    ("step_ms", "step\nms", ".1f"),
    ("iteration_ms", "iter.\nms", ".1f"),
)


@dataclass(frozen=True)
class Run:
    """One trained student."""

    objective: str
    method: str
    title: str
    accuracy: float
    history: History

    def summary(self) -> dict[str, str | float]:
        """The row of results.csv: means over the iterations, median times."""
        row: dict[str, str | float] = {"objective": self.objective, "method": self.method, "accuracy": self.accuracy}
        for column, name in MEANS.items():
            if column in self.history.curves:
                row[name] = float(self.history.curves[column].mean())
        return row | {"step_ms": self.history.step_ms, "iteration_ms": self.history.iteration_ms}


@dataclass(frozen=True)
class Compared:
    """Fused and reference step of one objective: from equal states, and as two runs of their own."""

    objective: str
    steps: int
    agreement: Agreement
    fused: Run
    reference: Run

    @property
    def drift(self) -> float:
        """Largest difference of a weight between the two runs over the first steps."""
        ours, theirs = (run.history.curves["distill_weight"][: self.steps] for run in (self.fused, self.reference))
        return float((ours - theirs).abs().max())


def table(runs: Iterable[Run]) -> Table:
    """The results for a terminal of 80 columns."""
    shown = Table(box=box.SIMPLE, padding=0)
    shown.add_column("loss\n", no_wrap=True)
    shown.add_column("method\n", no_wrap=True)
    for _, heading, _ in COLUMNS:
        shown.add_column(heading, justify="right")
    for objective, group in groupby(runs, lambda run: run.objective):
        for run in group:
            row = run.summary()
            cells = [format(row[name], form) if name in row else "-" for name, _, form in COLUMNS]
            shown.add_row(objective, run.title, *cells)
        shown.add_section()
    return shown


def notes(runs: Sequence[Run], comparisons: Iterable[Compared], test_images: int) -> list[str]:
    """What the table shows and what it does not."""
    share = sum(run.accuracy for run in runs) / len(runs)
    error = sqrt(share * (1 - share) / test_images)
    lines = [
        f"One seed and {test_images} test images: the standard error of an accuracy is {100 * error:.1f} points, so "
        f"differences below {200 * error:.1f} are noise.",
        "What balancing does beyond the scale 1 / L: DTO-KD against the sum of log losses, not the weighted sum.",
        "Two losses cost a second backward pass in every row here; a weighted sum by itself would not need it.",
    ]
    for c in comparisons:
        a, verdict = c.agreement, "agree" if c.agreement.holds else "DISAGREE"
        apart = 100 * abs(c.fused.accuracy - c.reference.accuracy)
        lines.append(
            f"{c.objective}: fused and reference {verdict} over {c.steps} steps, each from the same state: weights "
            f"differ by {a.weights:.1g} (allowed {a.weights_allowed:.1g}), updates by {a.update:.1g} of their length "
            f"(allowed {a.update_allowed:.1g}). As two runs of one method: weights by up to {c.drift:.1g} in these "
            f"steps, accuracy by {apart:.1f} points at the end."
        )
    return lines


def write_results(path: Path, runs: Iterable[Run]) -> None:
    """One row per student; empty where a column has no meaning for it."""
    _write(path, [run.summary() for run in runs])


def write_curves(path: Path, runs: Iterable[Run]) -> None:
    """One row per student and iteration. Holds no times: the same seed gives the same file."""
    rows: list[dict[str, str | float]] = []
    for run in runs:
        names = list(run.history.curves)
        for i, values in enumerate(torch.stack(list(run.history.curves.values()), 1).tolist()):
            numbers = {name: f"{value:.9g}" for name, value in zip(names, values, strict=True)}
            rows.append({"objective": run.objective, "method": run.method, "iteration": i, **numbers})
    _write(path, rows)


def write_agreement(path: Path, comparisons: Iterable[Compared]) -> None:
    """One row per objective: fused against reference."""
    _write(
        path,
        [
            {
                "objective": c.objective,
                "steps": c.steps,
                **asdict(c.agreement),
                "drift": c.drift,
                "accuracy_fused": c.fused.accuracy,
                "accuracy_reference": c.reference.accuracy,
            }
            for c in comparisons
        ],
    )


def _write(path: Path, rows: Sequence[Mapping[str, str | float]]) -> None:
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, runs: Sequence[Run]) -> None:
    """Weights, conflict and dominance over the iterations, one row of panels per objective.

    Lines are means over a twentieth of the run; dots are DTO-KD's single steps.
    """
    objectives = list(dict.fromkeys(run.objective for run in runs))
    figure = Figure(figsize=(13, 3.4 * len(objectives) + 0.4), layout="constrained")
    grid = figure.subplots(len(objectives), len(PANELS), squeeze=False, sharex=True)
    for axes_row, objective in zip(grid, objectives, strict=True):
        for axes, (column, title) in zip(axes_row, PANELS.items(), strict=True):
            for run in (r for r in runs if r.objective == objective):
                _draw(axes, run, run.history.curves[column])
            axes.set_title(f"{objective}: {title}", fontsize=10)
            axes.grid(alpha=0.3)
        weight, conflict, dominance = axes_row
        weight.set_ylim(-0.03, 1.03)
        conflict.axhline(0, color="black", linewidth=0.8)
        dominance.axhline(1, color="black", linewidth=0.8)
        dominance.set_yscale("log", base=2)
        dominance.yaxis.set_major_formatter("{x:g}")
    for axes in grid[-1]:
        axes.set_xlabel("iteration")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, run: Run, values: Tensor) -> None:
    if run.method == "dto":
        axes.plot(values, ".", color=STYLES["dto"]["color"], markersize=2, alpha=0.35)
    width = max(1, len(values) // 20)
    smooth = values.unfold(0, width, 1).mean(1)
    axes.plot(torch.arange(len(smooth)) + (width - 1) / 2, smooth, label=run.title, **STYLES[run.method])
