"""What the teacher cache saves, and what keeping a part of the logits costs.

Time: a timm deit_tiny learns from a deit_small, both untrained; the teacher's forward pass against a look into a
complete cache of 1000 classes. Accuracy: 100 classes, two MNIST digits side by side; a teacher that has seen many of
them, students that see few, by `dtokd train` without a cache and with the k most probable classes of each image. Prints
two tables.
"""

from __future__ import annotations

import argparse
import csv
import io
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median

import numpy as np
import torch
from dtokd.cli import main as dtokd
from dtokd.demo.data import distort, mnist_5k
from dtokd.objectives.cache import CachedImages, TeacherCache, TopClasses, Whole
from dtokd.objectives.taps import Outputs, Taps
from dtokd.objectives.teacher import Normalisation, Teacher
from PIL import Image
from torch import Tensor, nn

from .iterations import Pair
from .record import machine
from .timing import seconds_of

#: Of the classes of an image.
KEPT = (10, 50, None)
CLASSES, ROWS, TEMPERATURE = 1000, 4096, 4.0
#: Images per split of the two folders.
TEACHER, STUDENT, JUDGED = 4000, 1000, 1000


class _Random(nn.Module):
    """In a teacher's place, to fill a cache."""

    def forward(self, images: Tensor) -> Tensor:
        return 3 * torch.randn(len(images), CLASSES)


def lookup(k: int | None, batch: int, folder: Path, repeats: int = 30) -> tuple[float, int]:
    """Seconds of a look into a complete cache, the median; and bytes of a row."""
    cache = TeacherCache(folder / str(k), CachedImages(ROWS, {0: torch.arange(ROWS)}, 0, {}), {})
    dtype = torch.float32 if k is None else torch.float16
    cache.keep(Whole(dtype) if k is None else TopClasses(dtype, k, CLASSES, TEMPERATURE), Taps(logits=True), {})
    cache.lay_out(Outputs(logits=torch.zeros(1, CLASSES)))
    told: list[str] = []
    cache.reserve(told.append)
    teacher = Teacher(_Random(), "random", Normalisation())
    device = torch.device("cpu")

    def keys(samples: Tensor) -> Tensor:
        return torch.stack([samples, torch.zeros_like(samples)], 1)

    for samples in torch.arange(ROWS).split(512):
        cache(teacher, torch.zeros(len(samples), 1), keys(samples), device)
    images = torch.zeros(batch, 1)
    times = [
        seconds_of(lambda: cache(teacher, images, keys(torch.randint(ROWS, (batch,))), device)) for _ in range(repeats)
    ]
    return median(times), int(told[0].split(" bytes a row")[0].rsplit(" ", 1)[1])


def time_table(batch: int, size: int, iterations: int) -> str:
    """Markdown: per k the time of an iteration, and the share of it that the cache saves."""
    torch.set_num_threads(1)
    pair = Pair("deit_tiny", "deit_small", batch, size)
    optimizer = torch.optim.AdamW(pair.student.parameters(), fused=True)
    target = pair.teach()

    def learn() -> None:
        optimizer.zero_grad()
        losses = pair.losses(target)
        (losses["task"] + losses["distill"]).backward()
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
            saved = (teacher - look) / whole
            lines.append(f"| {k or 'all, float32'} | {row} | {1e3 * look:.2f} | {saved:.0%} |")
    return "\n".join(lines)


def write_pairs(folder: Path) -> None:
    """`teacher` and `student`, each with `train` and `validation`, with a folder per two-digit number."""
    images, labels = mnist_5k()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    parts = {"train": order[:4000], "validation": order[4000:]}
    for owner, split, count in (
        ("teacher", "train", TEACHER),
        ("student", "train", STUDENT),
        ("teacher", "validation", JUDGED),
        ("student", "validation", JUDGED),
    ):
        generator.manual_seed(1 if split == "train" else 2)
        chosen = parts[split][torch.randint(len(parts[split]), (count, 2), generator=generator)]
        for number, (left, right) in enumerate(chosen.tolist()):
            both = distort(images[[left, right]], generator)
            pixels = ((torch.cat([both[0, 0], both[1, 0]], 1) + 1) * 127.5).clamp(0, 255).to(torch.uint8)
            place = folder / owner / split / f"{int(labels[left])}{int(labels[right])}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(pixels)).resize((64, 32)).save(place / f"{number}.png")


def train(folder: Path, owner: str, name: str, epochs: int, *more: str) -> float:
    """The best top1, in percent, of one run of `dtokd train`; one that was interrupted goes on."""
    texts = f"--data-dir {folder / owner} --output {folder / 'runs'} --experiment {name} --epochs {epochs} -b 50 "
    texts += "--model test_resnet --in-chans 1 --input-size 1 32 64 --mean 0.5 --std 0.5 --opt adamw --lr 3e-3 "
    texts += "--warmup-epochs 1 --scale 0.8 1 --ratio 0.9 1.1 --hflip 0 --color-jitter 0 --workers 0 --device cpu "
    texts += "--no-log-tensorboard --resume auto"
    with redirect_stdout(io.StringIO()):
        code = dtokd(["train", *texts.split(), *more])
    if code:
        raise SystemExit(code)
    with (folder / "runs" / name / "summary.csv").open(newline="") as file:
        return max(float(row["eval_top1"]) for row in csv.DictReader(file))


def accuracy_table(folder: Path, epochs: tuple[int, int], views: int, seeds: Sequence[int]) -> str:
    """Markdown: the students' accuracy, by what is kept of the teacher's logits.

    Args:
        folder: for images, caches and runs.
        epochs: of the teacher and of a student.
        views: augmentations in a cache.
        seeds: of the students.
    """
    if not (folder / "student").exists():
        write_pairs(folder)
    taught = train(folder, "teacher", "teacher", epochs[0])
    kd = ["--kd-teacher-path", str(folder / "runs" / "teacher"), "--kd-temperature", str(TEMPERATURE)]
    mixed = ["--smoothing", "0", "--mixup", "0.2", "--reprob", "0.2"]
    ways: dict[str, list[str]] = {"no teacher": mixed, "no cache": [*mixed, *kd]}
    for k in KEPT:
        chosen = [] if k is None else ["--kd-cache-topk", str(k), "--kd-cache-dtype", "float16"]
        place = ["--kd-cache-teacher", str(folder / f"cache-{k}"), "--kd-cache-views", str(views)]
        ways[f"cache, {f'k = {k}, float16' if k else 'all, float32'}"] = [*mixed, *kd, *place, *chosen]
    lines = [
        f"{STUDENT} images of 100 classes, {epochs[1]} epochs, {views} augmentations; the teacher has {taught:.1f} %",
        "",
        f"| student | top1, % (seeds {', '.join(map(str, seeds))}) |",
        "|---|---:|",
    ]
    for way, options in ways.items():
        name = way.replace(" ", "").replace(",", "-")
        tops = [train(folder, "student", f"{name}-{s}", epochs[1], "--seed", str(s), *options) for s in seeds]
        lines.append(f"| {way} | {', '.join(f'{top:.1f}' for top in tops)} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache", description=__doc__)
    parser.add_argument(
        "--epochs", type=int, nargs=2, default=[10, 20], metavar="N", help="of the teacher, of a student"
    )
    parser.add_argument("--views", type=int, default=10, metavar="N", help="augmentations in a cache")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/cache"), help="for images, caches and runs")
    options = parser.parse_args()
    print(machine()["cpu"])
    print(time_table(options.batch, options.size, options.iterations), end="\n\n", flush=True)
    print(accuracy_table(options.folder, (options.epochs[0], options.epochs[1]), options.views, options.seeds))


if __name__ == "__main__":
    main()
