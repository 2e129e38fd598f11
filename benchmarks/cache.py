"""What the teacher cache saves of an iteration, and what keeping a part of the logits costs.

Time: a timm deit_tiny learns from a deit_small, both untrained; the teacher's forward pass against a look into a
complete cache of 1000 classes. Accuracy: 100 classes, two distorted MNIST digits side by side, from a teacher of single
digits whose logits add up; a student learns from labels and from what a cache gives back. Prints two tables.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import timm
import torch
import torch.nn.functional as F
from dtokd.objectives.cache import CachedImages, TeacherCache, TopClasses, Whole
from dtokd.objectives.logits import soft_kl
from dtokd.objectives.taps import Outputs, Taps
from dtokd.objectives.teacher import Normalisation, Teacher
from torch import Tensor, nn

from .digits import (
    LEARNING_RATE,
    ROLES,
    WEIGHT_DECAY,
    Images,
    accuracy,
    load_digits,
    make_model,
    one_cycle,
    seeded,
    train_teacher,
)
from .iterations import Pair
from .record import machine
from .timing import seconds_of

#: Of the classes of an image.
KEPT = (10, 50, None)
CLASSES, ROWS, TEMPERATURE = 1000, 4096, 4.0
#: Pairs of digits.
LEARNED, JUDGED = 4000, 2000


def kept_of(k: int | None, classes: int) -> Whole:
    """How a cache stores logits: all in float32, or the greatest in float16."""
    return Whole(torch.float32) if k is None else TopClasses(torch.float16, k, classes, TEMPERATURE)


class _Random(nn.Module):
    """In a teacher's place, to fill a cache."""

    def forward(self, images: Tensor) -> Tensor:
        return 3 * torch.randn(len(images), CLASSES)


def lookup(k: int | None, batch: int, folder: Path) -> tuple[float, int]:
    """Seconds of a look into a complete cache, the median; and bytes of a row."""
    cache = TeacherCache(folder / str(k), CachedImages(ROWS, {0: torch.arange(ROWS)}, 0, {}), {})
    cache.keep(kept_of(k, CLASSES), Taps(logits=True), {})
    cache.lay_out(Outputs(logits=torch.zeros(1, CLASSES)))
    told: list[str] = []
    cache.reserve(told.append)
    teacher, device = Teacher(_Random(), "random", Normalisation()), torch.device("cpu")

    def look(samples: Tensor) -> None:
        keys = torch.stack([samples, torch.zeros_like(samples)], 1)
        cache(teacher, torch.zeros(len(samples), 1), keys, device)

    for samples in torch.arange(ROWS).split(512):
        look(samples)
    times = [seconds_of(lambda: look(torch.randint(ROWS, (batch,)))) for _ in range(30)]
    return median(times), int(told[0].split(" bytes a row")[0].rsplit(" ", 1)[1])


def time_table(batch: int, size: int, iterations: int) -> str:
    """Markdown: per k the time of a look, and the share of an iteration that the cache saves."""
    torch.set_num_threads(1)
    pair = Pair("deit_tiny", "deit_small", batch, size)
    optimizer = torch.optim.AdamW(pair.student.parameters(), fused=True)
    target = pair.teach()

    def learn() -> None:
        optimizer.zero_grad()
        losses = pair.losses(target)
        torch.autograd.backward(losses["task"] + losses["distill"])
        optimizer.step()

    learn()
    teacher, student = (median(seconds_of(part) for _ in range(iterations)) for part in (pair.teach, learn))
    whole = teacher + student
    lines = [
        f"deit_tiny from deit_small, batch {batch}, {size} px, one thread: {1e3 * whole:.0f} ms an iteration, of them "
        f"{1e3 * teacher:.0f} the teacher's",
        "",
        "| kept of 1000 classes | bytes a row | a look, ms | share of an iteration saved |",
        "|---|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for k in KEPT:
            look, row = lookup(k, batch, Path(folder))
            kept = "all, float32" if k is None else f"{k}, float16"
            lines.append(f"| {kept} | {row} | {1e3 * look:.2f} | {(teacher - look) / whole:.0%} |")
    return "\n".join(lines)


def pairs_of(images: Images, count: int, generator: torch.Generator) -> tuple[Tensor, Images]:
    """Numbers [count, 2] of the digits, and the pairs side by side [count, 1, 28, 56] with labels from 0 to 99."""
    chosen = torch.randint(len(images), (count, 2), generator=generator)
    left, right = chosen.T
    both = torch.cat([images.images[left], images.images[right]], -1)
    return chosen, Images(both, 10 * images.labels[left] + images.labels[right])


def student_top1(learned: Images, logits: Tensor | None, judged: Images, iterations: int, seed: int) -> float:
    """Percent, of a student that learns from labels and, if there are any, from a teacher's logits [N, 100]."""
    with seeded(seed):
        student = timm.create_model("test_resnet", in_chans=1, num_classes=100, **ROLES["student"])
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = one_cycle(optimizer, iterations)
    numbers = Images(torch.arange(len(learned)), learned.labels)
    for index, labels in numbers.batches(iterations, seed):
        optimizer.zero_grad()
        output = student(learned.images[index])
        loss = F.cross_entropy(output, labels)
        torch.autograd.backward(loss if logits is None else loss + soft_kl(output, logits[index], TEMPERATURE))
        optimizer.step()
        schedule.step()
    return 100 * accuracy(student, judged)


@torch.no_grad()
def _taught(digits: nn.Module, images: Images, chosen: Tensor) -> Tensor:
    logits = torch.cat([digits(part) for part in images.images.split(500)])
    left, right = (logits[numbers] for numbers in chosen.T)
    return (left[:, :, None] + right[:, None, :]).flatten(1)


def accuracy_table(iterations: tuple[int, int], seeds: Sequence[int]) -> str:
    """Markdown: students' accuracy by what is kept of the teacher's logits.

    Args:
        iterations: of the teacher of digits, and of a student.
        seeds: of the students.
    """
    data, generator = load_digits(0), torch.Generator().manual_seed(0)
    with seeded(0):
        teacher = make_model("teacher")
    train_teacher(teacher, data.teacher, iterations=iterations[0], seed=0)
    chosen, learned = pairs_of(data.student, LEARNED, generator)
    logits = _taught(teacher, data.student, chosen)
    chosen, judged = pairs_of(data.test, JUDGED, generator)
    found = _taught(teacher, data.test, chosen).argmax(1) == judged.labels
    top = (logits / TEMPERATURE).softmax(1).sort(descending=True).values.cumsum(1)
    right, ten, fifty = found.double().mean(), top[:, 9].mean(), top[:, 49].mean()
    lines = [
        f"{LEARNED} pairs of distorted digits, {iterations[1]} iterations; the teacher has {100 * right:.1f} %; at T = "
        f"{TEMPERATURE:g} it gives its 10 greatest classes {ten:.0%}, its 50 greatest {fifty:.0%}",
        "",
        f"| kept of 100 classes | top1, % (seeds {', '.join(map(str, seeds))}) |",
        "|---|---:|",
    ]
    ways: dict[str, Tensor | None] = {"no teacher": None, "no cache": logits}
    for k in KEPT:
        kept = kept_of(k, 100)
        ways[f"cache: {f'{k}, float16' if k else 'all, float32'}"] = kept.decode(kept.encode(Outputs(logits=logits)))[
            0
        ].logits
    for way, given in ways.items():
        tops = ", ".join(f"{student_top1(learned, given, judged, iterations[1], seed):.1f}" for seed in seeds)
        lines.append(f"| {way} | {tops} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache", description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--iterations", type=int, default=5, help="that are timed")
    parser.add_argument("--learning", type=int, nargs=2, default=[400, 500], help="iterations of teacher and student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N")
    options = parser.parse_args()
    print(machine()["cpu"])
    print(time_table(options.batch, options.size, options.iterations), end="\n\n", flush=True)
    print(accuracy_table((options.learning[0], options.learning[1]), options.seeds))


if __name__ == "__main__":
    main()
