"""One student: Hinton's KL to a teacher on images that are made, real, of another kind, or noise."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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
from torch.optim.lr_scheduler import OneCycleLR

from ..digits import BATCH, MAX_NORM, WEIGHT_DECAY, accuracy
from .sets import OTHER, World, load

#: Sources of images that need no maker.
READY = ("data", "noise", "other")
#: Of the maker.
WIDTH, LATENT, STEPS, EVERY, WARMUP, BANK, MADE = 8, 64, 5, 5, 20, 4096, 32
TEMPERATURE = 4.0
_folder = Path()


@dataclass(frozen=True)
class Run:
    """What is trained.

    Attributes:
        data: of `sets.MAKERS`.
        source: of the images: one of `READY`, or the balance of their maker's losses.
        lr: the maker's learning rate; 0 without one.
        student_lr: the largest of the student's schedule.
        seed: of the student, and of all that is drawn.
        iterations: of the student.
    """

    data: str
    source: str
    lr: float
    student_lr: float
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


def start(folder: Path) -> None:
    """Prepare this process; `folder` holds the teachers."""
    global _folder
    torch.set_num_threads(1)
    _folder = folder


@cache
def world_of(name: str) -> World:
    """One of `sets.MAKERS`, once in a process."""
    return load(name, _folder)


def train(run: Run) -> Result:
    """Train one student."""
    world = world_of(run.data)
    began = time.process_time()
    torch.manual_seed(run.seed)
    student = world.student()
    student.to(memory_format=torch.channels_last)
    augment = Augment(round(world.size[1] / 16))
    maker = None if run.source in READY else _maker(run, world, student, augment)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = OneCycleLR(optimizer, run.student_lr, total_steps=run.iterations, cycle_momentum=False)
    made = None if maker is None else iter(maker)
    for _ in range(run.iterations):
        images = _ready(run, world, augment) if made is None else next(made)[0]
        student.train()
        with torch.no_grad():
            lesson = world.teacher(images)
        optimizer.zero_grad()
        torch.autograd.backward(soft_kl(student(images), lesson, TEMPERATURE))
        nn.utils.clip_grad_norm_(student.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - began
    (any_pair, one, two, three), skipped = ([math.nan] * 4, 0) if maker is None else maker.conflicts()
    right, judged = (100 * accuracy(student, images) for images in (world.validation, world.test))
    return Result(right, judged, any_pair, one, two, three, skipped, seconds)


def _ready(run: Run, world: World, augment: Augment) -> Tensor:
    """A batch of images that nobody has to make."""
    if run.source == "noise":
        return torch.rand(BATCH, *world.size) * 2 - 1
    images = world.images if run.source == "data" else world_of(OTHER[run.data]).images
    return augment(images[torch.randint(0, len(images), (BATCH,))])


class _Maker(SyntheticBatches):
    """Which keeps the cosines of its steps."""

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
        apart = torch.stack(self._cosines) < 0  # a gradient that is 0 has no cosine, and no conflict
        shares = [apart.any(1).double().mean(), *apart.double().mean(0)]
        return [100 * float(share) for share in shares], int(torch.stack(self._skipped).sum())


def _maker(run: Run, world: World, student: nn.Module, augment: Augment) -> _Maker:
    rule = parse_balance(run.source)
    losses = ImageLosses(
        world.teacher,
        student,
        BatchStatistics(world.teacher, 0.9),
        "kl",
        getattr(rule, "log_gradients", True),
    )
    channels = world.size[0]
    settings = Settings(world.size, [0.5] * channels, [0.5] * channels, world.classes, MADE, STEPS, run.lr, augment)
    generator = Generator(world.size, LATENT, WIDTH).to(memory_format=torch.channels_last)
    fast = Fast(settings, losses, rule, generator, latent_lr=3 * run.lr, rate=1.0, gram="exact")
    return _Maker(
        fast,
        settings,
        Bank(BANK, settings.size),
        student,
        world.teacher,
        augment,
        count=run.iterations,
        batch_size=BATCH,
        every=EVERY,
        warmup=WARMUP,
        balance=run.source,
        say=lambda text: None,
    ).noting()
