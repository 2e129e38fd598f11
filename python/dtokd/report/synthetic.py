"""The part of a run's page on images that were made from the teacher."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from .chart import line_chart
from .columns import over_steps, read_columns
from .html import table

#: Pictures on the page: the first and the last epoch's, and some between.
_SHOWN = 6


def synthetic_part(run: Path) -> str:
    """Pictures over the epochs, and losses, weights and conflict of their maker; nothing for other runs.

    Args:
        run: its directory.

    Raises:
        UsageError: a file of it is damaged.
    """
    steps = read_columns(run / "generator.csv", ("step",))
    if not steps:
        return ""
    charts = [
        line_chart("Losses of the images", over_steps(steps, "loss_"), "step of the images' optimizer"),
        line_chart("Weights of these losses", over_steps(steps, "weight_"), "step", log=True),
        line_chart("Conflict of these losses: cosine of their gradients", over_steps(steps, "cosine_"), "step", mark=0),
        line_chart("Norms of their gradients", over_steps(steps, "norm_"), "step", log=True),
    ]
    return (
        "<h2>Images made from the teacher</h2>"
        f"{_pictures(run / 'synthetic')}{conflicts(steps)}"
        f'<div class="grid-of">{"".join(charts)}</div>'
    )


def _pictures(folder: Path) -> str:
    files = sorted(folder.glob("epoch-*.png"))
    if not files:
        return ""
    last = len(files) - 1
    chosen = sorted({round(i * last / max(min(_SHOWN, len(files)) - 1, 1)) for i in range(min(_SHOWN, len(files)))})
    shown = [
        f"<figure><figcaption>{files[i].stem.replace('-', ' ').replace(' 0', ' ').lstrip()}</figcaption>"
        f'<img alt="{files[i].stem}" src="data:image/png;base64,{base64.b64encode(files[i].read_bytes()).decode()}">'
        "</figure>"
        for i in chosen
    ]
    return (
        "<p>The newest images after these epochs, sorted by the class that the teacher gives them.</p>"
        f'<div class="pictures">{"".join(shown)}</div>'
    )


def conflicts(steps: Mapping[str, list[float]]) -> str:
    """A table of the pairs of losses: the mean cosine of their gradients, and how often it is negative.

    Args:
        steps: columns of `generator.csv`.
    """
    names = [name.removeprefix("weight_") for name in steps if name.startswith("weight_")]
    rows: list[tuple[str, ...]] = [("", *names)]
    for i, first in enumerate(names):
        cells = []
        for j, second in enumerate(names):
            low, high = (first, second) if i < j else (second, first)
            cells.append("" if i == j else _told(steps.get(f"cosine_{low}_{high}", [])))
        rows.append((first, *cells))
    return (
        "<p>Cosine of the gradients, its mean over all steps, and the share of the steps in which it is negative, so "
        f"that the two losses are in conflict:</p>{table(rows)}"
    )


def _told(cosines: Sequence[float]) -> str:
    known = [value for value in cosines if math.isfinite(value)]
    if not known:
        return "not measured"
    return f"{sum(known) / len(known):.2f}, {100 * sum(value < 0 for value in known) / len(known):.0f} %"
