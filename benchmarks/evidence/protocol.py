"""In which order students are trained: learning rates are tuned on the validation images, the seeds that count follow.

For each method the learning rate starts at three values, a factor of 2 apart, and goes on while the best one lies at
an edge; then the two best are tried with another seed, and the better mean is taken. Among the fixed weights the one
with the best mean at its own learning rate is the reference. Neither looks at a test image, and the seeds of the tuning
are not used again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from .. import journal
from .methods import NONE, SETTINGS, Method, iterations_of, methods_of
from .students import Result

LEARNING_RATES = (8e-3, 16e-3, 32e-3)
#: The tuning stops here.
LOWEST, HIGHEST = 1e-3, 256e-3
TUNING_SEEDS = (100, 101)


@dataclass(frozen=True)
class Run:
    """What one run is told; `objective` "" trains without a teacher."""

    data: str
    objective: str
    method: str
    lr: float
    seed: int
    iterations: int


#: Trains what it is given, in any order, and returns results in the order given.
Train = Callable[[Sequence[Run]], list[Result]]


def read(path: Path) -> dict[Run, Result]:
    """The runs of a journal's file."""
    return journal.read(path, Run, Result)


def settings(data: str, objectives: Sequence[str]) -> Iterator[tuple[str, Method]]:
    """All that is compared on a data set: kinds of distillation and methods, first the student without a teacher.

    Args:
        data: which of `SETTINGS`.
        objectives: kinds of distillation; those that the data set does not have are passed over.
    """
    yield "", NONE
    for objective in (o for o in SETTINGS[data] if o in objectives):
        for method in methods_of(objective):
            yield objective, method


def carry_out(
    data: str,
    objectives: Sequence[str],
    seeds: Sequence[int],
    train: Train,
    titles: Sequence[str] = (),
) -> None:
    """Tune and train everything on one data set, or the methods with these titles; `train` is called from threads."""

    def one(setting: tuple[str, Method]) -> None:
        objective, method = setting
        run = Run(data, objective, method.title, math.nan, TUNING_SEEDS[0], iterations_of(data))
        lr = tune(run, train)
        train([replace(run, lr=lr, seed=seed) for seed in seeds])

    # a method alone does not fill the processes: its learning rates follow from each other
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(one, (s for s in settings(data, objectives) if not titles or s[1].title in titles)))


def tune(run: Run, train: Train) -> float:
    """The learning rate with the best mean accuracy on the validation images, as the module says.

    Args:
        run: but for its learning rate and its seed.
        train: carries runs out.
    """
    first, second = TUNING_SEEDS

    def accuracies(rates: Sequence[float], seed: int) -> list[float]:
        return [result.validation for result in train([replace(run, lr=lr, seed=seed) for lr in rates])]

    found = dict(zip(LEARNING_RATES, accuracies(LEARNING_RATES, first), strict=True))
    while True:
        best = max(found, key=lambda lr: found[lr])
        further = best / 2 if best == min(found) else best * 2 if best == max(found) else None
        if further is None or not LOWEST <= further <= HIGHEST:
            break
        found[further] = accuracies([further], first)[0]
    finalists = sorted(found, key=lambda lr: -found[lr])[:2]
    again = accuracies(finalists, second)
    return max(zip(finalists, again, strict=True), key=lambda pair: found[pair[0]] + pair[1])[0]


@dataclass(frozen=True)
class Outcome:
    """One method on one kind of loss.

    Attributes:
        objective, method: which.
        lr: the learning rate that tuning chose.
        validation: mean accuracy on the validation images of the runs that it chose by.
        results: by seed.
    """

    objective: str
    method: str
    lr: float
    validation: float
    results: dict[int, Result]


def outcomes(done: dict[Run, Result], data: str) -> list[Outcome]:
    """What the runs on a data set came to, in the order of `settings`; runs of another length do not count.

    Raises:
        ValueError: a method was tuned twice, with another learning rate.
    """
    grouped: dict[tuple[str, str], dict[Run, Result]] = {(o, m.title): {} for o, m in settings(data, SETTINGS[data])}
    for run, result in done.items():
        if run.data == data and run.iterations == iterations_of(data):
            grouped[run.objective, run.method][run] = result
    found = []
    for (objective, method), runs in grouped.items():
        counted = {run.seed: result for run, result in runs.items() if run.seed not in TUNING_SEEDS}
        rates = {run.lr for run in runs if run.seed not in TUNING_SEEDS}
        if not rates:
            continue  # not trained, or still being tuned
        if len(rates) > 1:
            raise ValueError(
                f"{data}, {objective}, {method}: counted seeds have the learning rates {sorted(rates)}; remove the "
                "rows of the older tuning"
            )
        lr = rates.pop()
        tuned = [result.validation for run, result in runs.items() if run.seed in TUNING_SEEDS and run.lr == lr]
        found.append(Outcome(objective, method, lr, fmean(tuned), counted))
    return found
