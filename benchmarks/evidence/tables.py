"""Tables of the evidence, from the runs' rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from .protocol import Outcome, Run, outcomes
from .students import Result


def markdown(done: dict[Run, Result]) -> str:
    """All tables, a heading for each."""
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts(done).items())


def parts(done: dict[Run, Result]) -> dict[str, str]:
    """The tables by title: accuracies and what training was like, for each data set and kind of loss."""
    found = {}
    for data in dict.fromkeys(run.data for run in done):
        all_of = outcomes(done, data)
        bare = [o for o in all_of if not o.objective]
        for objective in dict.fromkeys(o.objective for o in all_of if o.objective):
            found[f"{data}, {objective}"] = _table([*bare, *(o for o in all_of if o.objective == objective)])
    return found


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
    seeds = [seed for seed in o.results if seed in best.results]
    differences = [o.results[seed].test - best.results[seed].test for seed in seeds]
    error = f" ± {stdev(differences) / math.sqrt(len(seeds)):.1f}" if len(seeds) > 1 else ""
    return [f"{fmean(differences):+.1f}{error}", f"{sum(d > 0 for d in differences)}/{len(seeds)}"]


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
