"""Distillation without data on digits: hand-set weights, tuned ones, and each balance, against data and noise.

A student learns from a teacher of distorted digits by Hinton's KL alone. What differs is where its images come from
and how the losses of their maker are balanced. As in the evidence, the maker's learning rate is tuned for each method
on validation images, with seeds that are not used again, and so are the weights of `tuned`; the test images judge.

Each run is a row of a CSV file, written when it is done, so that a killed command goes on. Prints a table of it.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev

import torch
from dtokd.datafree.augment import Augment
from dtokd.datafree.balance import parse_balance
from dtokd.datafree.bank import Bank
from dtokd.datafree.generator import Generator
from dtokd.datafree.loader import SyntheticBatches
from dtokd.datafree.losses import ImageLosses
from dtokd.datafree.statistics import BatchStatistics
from dtokd.datafree.synthesis import Fast, Settings
from dtokd.objectives.logits import soft_kl
from torch import Tensor, nn

from .digits import BATCH, MAX_NORM, WEIGHT_DECAY, Images, accuracy, load_digits, make_model, one_cycle, seeded
from .digits import train_teacher as fit_teacher

PUBLISHED = "fixed:10,0.4,1.1"
#: Rules without a weight to tune.
BALANCES = ("dto", "famo", "logsum", "share", "mgda", "pcgrad", "cagrad", "imtlg", "alignedmtl", "upgrad", "nashmtl")
#: The weights that are tried for `tuned`, that of statistics being 1: around the published ratios.
GRID = [f"fixed:1,{one:g},{other:g}" for one, other in product((0.04, 0.4, 4.0), (0.0, 0.11, 1.1))]
#: Students whose images no maker makes.
OTHERS = ("data", "noise")
LEARNING_RATES = (2.5e-3, 5e-3, 1e-2)
TUNING_SEEDS = (100, 101)
TEACHER_ITERATIONS, TEACHER_SEED = 650, 1
#: Of the maker, as `make demo-data-free` has them.
WIDTH, LATENT, STEPS, EVERY, WARMUP, BANK = 16, 64, 5, 4, 20, 4096


@dataclass(frozen=True)
class Run:
    """What is trained; `balance` may be one of `OTHERS`, whose `lr` is 0."""

    balance: str
    lr: float
    seed: int
    iterations: int


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        validation, test: accuracy of the student, in percent.
        conflict: share of the maker's steps, in percent, in which two of the three gradients point apart.
        statistics_confidence, statistics_disagreement, confidence_disagreement: such a share of each pair.
        skipped: steps of the maker that were skipped.
        seconds: processor time of the run.
    """

    validation: float
    test: float
    conflict: float
    statistics_confidence: float
    statistics_disagreement: float
    confidence_disagreement: float
    skipped: int
    seconds: float


@cache
def teacher_and_digits() -> tuple[nn.Module, Images, Images, Images]:
    """A trained teacher, the students' digits, and those to choose by and to judge by."""
    digits = load_digits(0)
    with seeded(TEACHER_SEED):
        teacher = make_model("teacher")
    fit_teacher(teacher, digits.teacher, iterations=TEACHER_ITERATIONS, seed=TEACHER_SEED)
    half = len(digits.test) // 2
    first = Images(digits.test.images[:half], digits.test.labels[:half])
    return teacher, digits.student, first, Images(digits.test.images[half:], digits.test.labels[half:])


def train(run: Run) -> Result:
    """Train one student, in this process, by one thread."""
    torch.set_num_threads(1)
    teacher, digits, validation, test = teacher_and_digits()
    start = time.process_time()
    torch.manual_seed(run.seed)
    student = make_model("student")
    augment = Augment(2)
    made = None if run.balance in OTHERS else _maker(run, teacher, student, augment)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = one_cycle(optimizer, run.iterations)
    batches = iter(made) if made is not None else None
    known = digits.batches(run.iterations, run.seed)
    for _ in range(run.iterations):
        if batches is not None:
            images, _ = next(batches)
        elif run.balance == "noise":
            images = torch.rand(BATCH, *digits.images.shape[1:]) * 2 - 1
        else:
            images = augment(next(known)[0])
        student.train()
        with torch.no_grad():
            lesson = teacher(images)
        optimizer.zero_grad()
        torch.autograd.backward(soft_kl(student(images), lesson, 4.0))
        nn.utils.clip_grad_norm_(student.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - start
    (any_pair, one, two, three), skipped = ([math.nan] * 4, 0) if made is None else made.conflicts()
    right, judged = (100 * accuracy(student, images) for images in (validation, test))
    return Result(right, judged, any_pair, one, two, three, skipped, seconds)


class _Maker(SyntheticBatches):
    """Which notes the conflicts of its steps."""

    def noting(self) -> _Maker:
        """Begin."""
        self._cosines: list[Tensor] = []
        self._skipped: list[Tensor] = []
        return self

    def _watch(self, balance, losses):  # type: ignore[no-untyped-def]
        super()._watch(balance, losses)
        self._cosines.append(balance.cosine[[0, 0, 1], [1, 2, 2]])
        self._skipped.append(balance.skipped.reshape(()))

    def conflicts(self) -> tuple[list[float], int]:
        """Shares in percent: of any pair, then of each; and the number of skipped steps."""
        apart = torch.stack(self._cosines) < 0  # of a gradient that is 0 there is no cosine, and no conflict
        shares = [apart.any(1).double().mean(), *apart.double().mean(0)]
        return [100 * float(share) for share in shares], int(torch.stack(self._skipped).sum())


def _maker(run: Run, teacher: nn.Module, student: nn.Module, augment: Augment) -> _Maker:
    rule = parse_balance(run.balance)
    losses = ImageLosses(teacher, student, BatchStatistics(teacher, 0.9), "kl", getattr(rule, "log_gradients", True))
    settings = Settings((1, 28, 28), [0.5], [0.5], 10, 64, STEPS, run.lr, augment)
    generator = Generator(settings.size, LATENT, WIDTH)
    fast = Fast(settings, losses, rule, generator, latent_lr=3 * run.lr, rate=1.0, gram="exact")
    return _Maker(
        fast,
        settings,
        Bank(BANK, settings.size),
        student,
        teacher,
        augment,
        count=run.iterations,
        batch_size=BATCH,
        every=EVERY,
        warmup=WARMUP,
        balance=run.balance,
        say=lambda text: None,
    ).noting()


class Journal:
    """The runs that are done, a row each.

    Args:
        path: of the CSV file.
        executor: carries the others out; None for this process.
    """

    def __init__(self, path: Path, executor: ProcessPoolExecutor | None = None) -> None:
        self._path, self._executor = path, executor
        self.done = read(path)

    def __call__(self, runs: Sequence[Run]) -> list[Result]:
        """The results, of runs on file and of those that are trained now."""
        missing = [run for run in dict.fromkeys(runs) if run not in self.done]
        results = map(train, missing) if self._executor is None else self._executor.map(train, missing)
        for run, result in zip(missing, results, strict=True):
            self.done[run] = result
            row = {**asdict(run), **asdict(result)}
            fresh = not self._path.exists()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                if fresh:
                    writer.writeheader()
                writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})
            print(run, f"{result.test:.1f} %", file=sys.stderr, flush=True)
        return [self.done[run] for run in runs]


def read(path: Path) -> dict[Run, Result]:
    """The runs of a file; none if it is not there."""
    if not path.exists():
        return {}
    kinds = {
        field.name: {"str": str, "int": int, "float": float}[str(field.type)]
        for c in (Run, Result)
        for field in fields(c)
    }
    found = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values = {name: kinds[name](value) for name, value in row.items()}
            run = Run(**{field.name: values.pop(field.name) for field in fields(Run)})
            found[run] = Result(**values)
    return found


def tune(balances: Sequence[str], iterations: int, train: Journal) -> Run:
    """The run with the best mean accuracy on the validation images: over weights, if there are several, and rates."""
    first, second = TUNING_SEEDS
    tried = [Run(balance, lr, first, iterations) for balance in balances for lr in LEARNING_RATES]
    scores = dict(zip(tried, (result.validation for result in train(tried)), strict=True))
    finalists = sorted(scores, key=lambda run: -scores[run])[:2]
    again = [result.validation for result in train([replace(run, seed=second) for run in finalists])]
    return max(zip(finalists, again, strict=True), key=lambda pair: scores[pair[0]] + pair[1])[0]


def table(methods: Sequence[str], seeds: Sequence[int], iterations: int, train: Journal) -> str:
    """Train what is missing; a row for each method, in Markdown."""
    lines = ["| images, balance | lr | test, % | conflict, % | s |", "|---|---|---|---|---|"]
    for method in methods:
        if method in OTHERS:
            chosen = Run(method, 0.0, 0, iterations)
        else:
            chosen = tune(GRID if method == "tuned" else [method], iterations, train)
        results = train([replace(chosen, seed=seed) for seed in seeds])
        values = [result.test for result in results]
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        told = f"tuned, {chosen.balance}" if method == "tuned" else method
        conflict = "" if method in OTHERS else f"{fmean(r.conflict for r in results):.0f}"
        rate = "" if method in OTHERS else f"{chosen.lr:g}"
        seconds = fmean(r.seconds for r in results)
        lines.append(f"| {told} | {rate} | {fmean(values):.1f}{spread} | {conflict} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    methods = (*OTHERS, PUBLISHED, "tuned", *BALANCES)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.datafree", description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(methods), metavar="RULE", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="that are counted")
    parser.add_argument("--iterations", type=int, default=750, help="of each student")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each; no result depends on it")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence/datafree.csv"), help="the CSV file")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as executor:
        print(table(options.methods, options.seeds, options.iterations, Journal(options.output, executor)))


if __name__ == "__main__":
    main()
