"""How learning rates and hand-set weights are chosen, and the tables.

For each source of images the maker's learning rate is chosen first, of three, then the student's is tried at half and
at twice its value, and further up while the highest is the best; the two best pairs are tried with another seed, and
the better mean is taken. For the source
`TUNED` nine hand-set weights are compared before that. All by validation images, and with seeds that are not used
again; the test images judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean

from ..evidence.tables import paired_interval, with_spread
from .sets import OTHER
from .students import READY, Result, Run

PUBLISHED = "fixed:10,0.4,1.1"
TUNED = "tuned"
#: Rules without a weight to tune.
BALANCES = ("dto", "share", "famo", "mgda", "upgrad", "pcgrad", "logsum", "imtlg", "cagrad", "alignedmtl", "nashmtl")
#: The weights that are tried for `TUNED`, that of statistics being 1: around the published ratios.
GRID = [f"fixed:1,{one:g},{other:g}" for one, other in product((0.04, 0.4, 4.0), (0.0, 0.11, 1.1))]
#: Of the maker, the one in the middle first; and of the student.
LEARNING_RATES, STUDENT_LR = (5e-3, 1e-2, 2e-2), 0.018
#: The student's tuning stops here.
HIGHEST = 0.072
TUNING_SEEDS = (100, 101)
#: Trains what it is given, in any order, and returns results in the order given.
Train = Callable[[Sequence[Run]], list[Result]]


#: Of the students that are counted.
SEEDS, ITERATIONS = (0, 1, 2, 3, 4), 250


def sources_of(data: str) -> tuple[str, ...]:
    """All sources of images of a set."""
    return tuple(s for s in (*READY, PUBLISHED, TUNED, *BALANCES) if s != "other" or data in OTHER)


@dataclass(frozen=True)
class Outcome:
    """What a source of images came to.

    Attributes:
        source: one of `sources_of`.
        run: as it was tuned, but for the seed.
        results: by seed.
        used: all runs, those of the tuning included.
    """

    source: str
    run: Run
    results: dict[int, Result]
    used: dict[Run, Result]


def carry_out(data: str, sources: Iterable[str], seeds: Sequence[int], iterations: int, train: Train) -> None:
    """Tune and train; `train` is called from threads, as the runs of a source follow from each other."""
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda source: _one(data, source, seeds, iterations, train), sources))


def outcomes(data: str, seeds: Sequence[int], iterations: int, done: Mapping[Run, Result]) -> list[Outcome]:
    """What the runs on file come to; sources some of whose runs are missing are left out."""
    found = []
    for source in sources_of(data):
        with suppress(KeyError):
            found.append(_one(data, source, seeds, iterations, lambda runs: [done[run] for run in runs]))
    return found


def _one(data: str, source: str, seeds: Sequence[int], iterations: int, train: Train) -> Outcome:
    used: dict[Run, Result] = {}

    def noting(runs: Sequence[Run]) -> list[Result]:
        results = train(runs)
        used.update(zip(runs, results, strict=True))
        return results

    run = tune(Run(data, source, 0.0, STUDENT_LR, TUNING_SEEDS[0], iterations), noting)
    results = noting([replace(run, seed=seed) for seed in seeds])
    return Outcome(source, run, dict(zip(seeds, results, strict=True)), used)


def tune(run: Run, train: Train) -> Run:
    """The run with the rates, and weights, that did best, as the module says."""
    found: dict[Run, float] = {}

    def best_of(runs: Sequence[Run]) -> Run:
        found.update(zip(runs, (result.validation for result in train(runs)), strict=True))
        return max(found, key=lambda tried: found[tried])

    best = run
    if run.source not in READY:
        best = replace(run, lr=LEARNING_RATES[1])
        if run.source == TUNED:
            best = best_of([replace(best, source=weights) for weights in GRID])
        best = best_of([replace(best, lr=lr) for lr in LEARNING_RATES])
    best = best_of([replace(best, student_lr=best.student_lr * factor) for factor in (1.0, 0.5, 2.0)])
    while best.student_lr == max(tried.student_lr for tried in found) and best.student_lr < HIGHEST:
        best = best_of([replace(best, student_lr=best.student_lr * 2)])
    finalists = sorted(found, key=lambda tried: -found[tried])[:2]
    again = [result.validation for result in train([replace(f, seed=TUNING_SEEDS[1]) for f in finalists])]
    return max(zip(finalists, again, strict=True), key=lambda pair: found[pair[0]] + pair[1])[0]


_HEAD = (
    *("images", "test, %", "of that with data, %", "to the tuned weights", "interval", "conflict, %", "s", "students"),
    "lr, student's lr",
)


def table(outcomes: Sequence[Outcome]) -> str:
    """A row for each source, in Markdown. Intervals are for all differences to the tuned weights together."""
    by_source = {o.source: o for o in outcomes}
    tuned, data = by_source.get(TUNED), by_source.get("data")
    lines = ["| " + " | ".join(_HEAD) + " |", "|---" * len(_HEAD) + "|"]
    compared = sum(o.source not in READY for o in outcomes) - 1
    for o in outcomes:
        values = list(o.results.values())
        ratio = "" if data is None else f"{100 * _mean(o) / _mean(data):.0f}"
        difference, interval = "", ""
        if tuned is o:
            difference = "reference"
        elif tuned is not None and o.source not in READY:
            pairs = [o.results[seed].test - tuned.results[seed].test for seed in o.results if seed in tuned.results]
            difference, interval = f"{fmean(pairs):+.1f}", paired_interval(pairs, compared)
        conflicts = [r.conflict for r in values]
        cells = [
            f"tuned, {o.run.source}" if o is tuned else o.source,
            with_spread([r.test for r in values]),
            ratio,
            difference,
            interval,
            "" if any(map(math.isnan, conflicts)) else f"{fmean(conflicts):.0f}",
            f"{fmean(r.seconds for r in values):.0f}",
            str(len(o.used)),
            (f"{o.run.lr:g}, " if o.run.lr else "") + f"{o.run.student_lr:g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(o: Outcome) -> float:
    return fmean(result.test for result in o.results.values())
