"""Tables of the evidence, from the runs' rows alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from .protocol import Outcome, Run, outcomes
from .students import Result


def markdown(done: dict[Run, Result]) -> str:
    """All tables, a heading for each."""
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts(done).items())


def parts(done: dict[Run, Result]) -> dict[str, str]:
    """The tables by title: a summary; accuracies and what training was like, for each data set and kind of loss."""
    settings: dict[str, list[Outcome]] = {}
    for data in dict.fromkeys(run.data for run in done):
        all_of = outcomes(done, data)
        bare = [o for o in all_of if not o.objective]
        for objective in dict.fromkeys(o.objective for o in all_of if o.objective):
            settings[f"{data}, {objective}"] = [*bare, *(o for o in all_of if o.objective == objective)]
    return {"summary": _summary(settings), **{title: _table(found) for title, found in settings.items()}}


def _summary(settings: Mapping[str, Sequence[Outcome]]) -> str:
    """Each method's differences to the best fixed weights over data sets and kinds of loss, the best mean first."""
    differences: dict[str, list[tuple[float, str]]] = {}
    for title, found in settings.items():
        best = reference(found)
        if best is None:
            continue
        for o in found:
            differences.setdefault(o.method, []).append((fmean(_differences(o, best)), title))
    lines = ["| | mean | worst | in | settings |", "|---|---|---|---|---|"]
    for method, values in sorted(differences.items(), key=lambda item: -fmean(d for d, _ in item[1])):
        worst, where = min(values)
        mean = fmean(d for d, _ in values)
        lines.append(f"| {method} | {mean:+.1f} | {worst:+.1f} | {where} | {len(values)} |")
    return "\n".join(lines)


def reference(found: Sequence[Outcome]) -> Outcome | None:
    """The fixed weights that did best on the validation images."""
    fixed = [o for o in found if o.method.startswith("fixed")]
    return max(fixed, key=lambda o: o.validation) if fixed else None


def _table(found: Sequence[Outcome]) -> str:
    best = reference(found)
    lines = [
        "| | test accuracy, % | to the best fixed | better | lr | weight | vertex, % | conflict, % | cosine "
        "| task loss | distillation loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for o in found:
        cells = [f"**{o.method}**" if o is best else o.method, _spread([r.test for r in o.results.values()])]
        cells += ["reference", ""] if o is best else _paired(o, best)
        cells.append(f"{o.lr:g}")
        for name, spec in _COLUMNS.items():
            values = [getattr(r, name) for r in o.results.values()]
            cells.append("" if any(map(math.isnan, values)) else format(fmean(values), spec))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_COLUMNS = {
    "weight": ".2f",
    "vertex": ".0f",
    "conflict": ".0f",
    "cosine": ".2f",
    "task_loss": ".2f",
    "distill_loss": ".2f",
}


def _paired(o: Outcome, best: Outcome | None) -> list[str]:
    """Mean difference over the seeds that both have, its standard error, and in how many it is better."""
    if best is None:
        return ["", ""]
    differences = _differences(o, best)
    several = len(differences) > 1
    error = f" ± {stdev(differences) / math.sqrt(len(differences)):.1f}" if several else ""
    return [f"{fmean(differences):+.1f}{error}", f"{sum(d > 0 for d in differences)}/{len(differences)}"]


def _differences(o: Outcome, best: Outcome) -> list[float]:
    """In test accuracy, seed by seed."""
    return [o.results[seed].test - best.results[seed].test for seed in o.results if seed in best.results]


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
