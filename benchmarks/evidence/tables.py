"""Tables of the evidence, from the runs' rows alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from dtokd.compare.differences import LEVEL, student_t

from .methods import BAD_TEACHERS, NONE, SETTINGS
from .protocol import Outcome, Run, outcomes
from .students import Result


def markdown(done: dict[Run, Result]) -> str:
    """All tables, a heading for each."""
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts(done).items())


def parts(done: dict[Run, Result]) -> dict[str, str]:
    """The tables by title: two summaries; then accuracies and what training was like, for each setting."""
    settings: dict[str, list[Outcome]] = {}
    for data in (name for name in SETTINGS if any(run.data == name for run in done)):
        all_of = outcomes(done, data)
        bare = [o for o in all_of if not o.objective]
        for objective in dict.fromkeys(o.objective for o in all_of if o.objective):
            settings[f"{data}, {objective}"] = [*bare, *(o for o in all_of if o.objective == objective)]
    bad = {title: found for title, found in settings.items() if title.startswith(BAD_TEACHERS)}
    good = {title: found for title, found in settings.items() if title not in bad}
    summaries = {"summary": _summary(good), "bad teachers": _side_by_side(bad)}
    tables = {title: _table(found) for title, found in settings.items()}
    return {title: text for title, text in {**summaries, **tables}.items() if text}


def _summary(settings: Mapping[str, Sequence[Outcome]]) -> str:
    """Each method's differences to the best fixed weights over the settings, the best mean first; "" without settings.

    The interval is for the mean over settings like these.
    """
    differences: dict[str, dict[str, float]] = {}
    alone: dict[str, float] = {}
    for title, found in settings.items():
        best = reference(found)
        if best is None:
            continue
        for o in found:
            differences.setdefault(o.method, {})[title] = fmean(_differences(o, best))
        for method, difference in _to_no_teacher(found).items():
            alone[method] = min(alone.get(method, math.inf), difference)
    if not differences:
        return ""
    lines = ["| | mean | interval | worst | in | worst to no teacher | settings |", "|---|---|---|---|---|---|---|"]
    for method, of in sorted(differences.items(), key=lambda item: -fmean(item[1].values())):
        worst = min(of, key=lambda title: of[title])
        interval = paired_interval(list(of.values()), len(differences))
        to_none = f"{alone[method]:+.1f}" if method in alone else ""
        cells = [method, f"{fmean(of.values()):+.1f}", interval, f"{of[worst]:+.1f}", worst, to_none, str(len(of))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _side_by_side(settings: Mapping[str, Sequence[Outcome]]) -> str:
    """Differences to the student without a teacher, a column for each setting, the best worst case first."""
    columns = {title: _to_no_teacher(found) for title, found in settings.items()}
    methods = dict.fromkeys(method for of in columns.values() for method in of if method != NONE.title)
    if not methods:
        return ""
    worst = {method: min(of[method] for of in columns.values() if method in of) for method in methods}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method in sorted(methods, key=lambda method: -worst[method]):
        cells = [f"{of[method]:+.1f}" if method in of else "" for of in columns.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _to_no_teacher(found: Sequence[Outcome]) -> dict[str, float]:
    """Each method's mean difference to the student that learns alone."""
    alone = next((o for o in found if o.method == NONE.title), None)
    return {o.method: fmean(_differences(o, alone)) for o in found} if alone is not None else {}


def paired_interval(differences: Sequence[float], comparisons: int) -> str:
    """Ends of the paired t-interval of a mean difference: so many hold together with `LEVEL` (Bonferroni)."""
    n = len(differences)
    if n < 2 or not any(differences):
        return ""
    half = student_t(1 - (1 - LEVEL) / comparisons, n - 1) * stdev(differences) / math.sqrt(n)
    return f"{fmean(differences) - half:+.1f} to {fmean(differences) + half:+.1f}"


def reference(found: Sequence[Outcome]) -> Outcome | None:
    """The fixed weights that did best on the validation images."""
    fixed = [o for o in found if o.method.startswith("fixed")]
    return max(fixed, key=lambda o: o.validation) if fixed else None


def _table(found: Sequence[Outcome]) -> str:
    best = reference(found)
    lines = [
        "| | test accuracy, % | to the best fixed | interval | better | lr | weight | vertex, % | conflict, % | cosine "
        "| task loss | distillation loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for o in found:
        cells = [f"**{o.method}**" if o is best else o.method, with_spread([r.test for r in o.results.values()])]
        if best is None:
            cells += ["", "", ""]
        elif o is best:
            cells += ["reference", "", ""]
        else:
            differences = _differences(o, best)
            better = f"{sum(d > 0 for d in differences)}/{len(differences)}"
            cells += [f"{fmean(differences):+.1f}", paired_interval(differences, len(found) - 1), better]
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


def _differences(o: Outcome, other: Outcome) -> list[float]:
    """In test accuracy, seed by seed."""
    return [o.results[seed].test - other.results[seed].test for seed in o.results if seed in other.results]


def with_spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
