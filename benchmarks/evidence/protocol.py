"""In which order students are trained: learning rates are tuned on the validation images, the seeds that count follow.

For each method the learning rate starts at three values, a factor of 2 apart, and goes on while the best one lies at
an edge; then the two best are tried with another seed, and the better mean is taken. Among the fixed weights the one
with the best mean at its own learning rate is the reference. Neither looks at a test image, and the seeds of the tuning
are not used again.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

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


class Journal:
    """All runs that are done, in a CSV file that grows by a row per run, so that a killed command goes on.

    Args:
        path: of the file.
        executor: carries the runs out.
        train: does one; a function that the executor's processes know.
        commit: of the code that trains; written beside each run.
    """

    def __init__(self, path: Path, executor: Executor, train: Callable[[Run], Result], commit: str = "") -> None:
        self._path, self._executor, self._train, self._commit = path, executor, train, commit
        self._done = read(path) if path.exists() else {}
        self._lock = Lock()

    def __call__(self, runs: Sequence[Run]) -> list[Result]:
        """The results of `runs`, trained where they are not on file."""
        missing = [run for run in runs if run not in self._done]
        for run, result in zip(missing, self._executor.map(self._train, missing), strict=True):
            with self._lock:
                self._done[run] = result
                self._append(run, result)
        return [self._done[run] for run in runs]

    def _append(self, run: Run, result: Result) -> None:
        row = {**asdict(run), **asdict(result), "commit": self._commit}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self._path.exists()
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})


def read(path: Path) -> dict[Run, Result]:
    """The runs of a journal's file."""
    with path.open(newline="", encoding="utf-8") as file:
        return dict(_parsed(row) for row in csv.DictReader(file))


def _parsed(row: dict[str, str]) -> tuple[Run, Result]:
    row.pop("commit")
    counts = {"seed", "iterations", "skipped"}
    typed: dict[str, Any] = {
        key: value if key in ("data", "objective", "method") else int(value) if key in counts else float(value)
        for key, value in row.items()
    }
    run = Run(**{key: typed.pop(key) for key in Run.__dataclass_fields__})
    return run, Result(**typed)


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
    """What the runs on a data set came to, in the order of `settings`."""
    grouped: dict[tuple[str, str], dict[Run, Result]] = {(o, m.title): {} for o, m in settings(data, SETTINGS[data])}
    for run, result in done.items():
        if run.data == data:
            grouped[run.objective, run.method][run] = result
    found = []
    for (objective, method), runs in grouped.items():
        counted = {run.seed: result for run, result in runs.items() if run.seed not in TUNING_SEEDS}
        rates = {run.lr for run in runs if run.seed not in TUNING_SEEDS}
        if len(rates) != 1:
            continue  # not trained, or still being tuned
        lr = rates.pop()
        tuned = [result.validation for run, result in runs.items() if run.seed in TUNING_SEEDS and run.lr == lr]
        found.append(Outcome(objective, method, lr, fmean(tuned), counted))
    return found
