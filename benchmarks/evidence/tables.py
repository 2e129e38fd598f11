"""Tables of the evidence, from the runs' rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev

from dtokd.compare.differences import Difference, Paired

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
    summaries = {"summary": _summary(good, reference), "bad teachers": _summary(bad, _without_teacher)}
    tables = {title: _table(found) for title, found in settings.items()}
    return {title: text for title, text in {**summaries, **tables}.items() if text}


def _summary(settings: Mapping[str, Sequence[Outcome]], to: Callable[[Sequence[Outcome]], Outcome | None]) -> str:
    """Each method's differences over the settings, the best worst-case first among equal means; "" without settings.

    The interval is for the mean over settings like these: a setting is a block of `Paired`, of all methods that were
    trained in all of them.
    """
    differences: dict[str, dict[str, float]] = {}
    for title, found in settings.items():
        base = to(found)
        if base is None:
            continue
        for o in found:
            differences.setdefault(o.method, {})[title] = fmean(_differences(o, base))
    if not differences:
        return ""
    everywhere = {method: list(of.values()) for method, of in differences.items() if len(of) == len(settings)}
    paired = Paired({**everywhere, "": [0.0] * len(settings)})
    lines = ["| | mean | interval | worst | in | settings |", "|---|---|---|---|---|---|"]
    for method, of in sorted(differences.items(), key=lambda item: -fmean(item[1].values())):
        worst = min(of, key=lambda title: of[title])
        interval = _interval(paired.between(method, "")) if method in everywhere else ""
        mean = fmean(of.values())
        lines.append(f"| {method} | {mean:+.1f} | {interval} | {of[worst]:+.1f} | {worst} | {len(of)} |")
    return "\n".join(lines)


def _interval(difference: Difference) -> str:
    if math.isinf(difference.high):
        return ""
    return f"{difference.low:+.1f} to {difference.high:+.1f}"


def _without_teacher(found: Sequence[Outcome]) -> Outcome | None:
    return next((o for o in found if o.method == NONE.title), None)


def reference(found: Sequence[Outcome]) -> Outcome | None:
    """The fixed weights that did best on the validation images."""
    fixed = [o for o in found if o.method.startswith("fixed")]
    return max(fixed, key=lambda o: o.validation) if fixed else None


def _table(found: Sequence[Outcome]) -> str:
    best = reference(found)
    seeds = sorted(set.intersection(*(set(o.results) for o in found)))
    paired = Paired({o.method: [o.results[seed].test for seed in seeds] for o in found}) if seeds else None
    lines = [
        "| | test accuracy, % | to the best fixed | interval | better | lr | weight | vertex, % | conflict, % | cosine "
        "| task loss | distillation loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for o in found:
        cells = [f"**{o.method}**" if o is best else o.method, _spread([r.test for r in o.results.values()])]
        if best is None or paired is None:
            cells += ["", "", ""]
        elif o is best:
            cells += ["reference", "", ""]
        else:
            differences = _differences(o, best)
            better = f"{sum(d > 0 for d in differences)}/{len(differences)}"
            cells += [f"{fmean(differences):+.1f}", _interval(paired.between(o.method, best.method)), better]
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


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
