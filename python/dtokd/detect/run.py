"""`dtokd detect`: from the options to a run directory, by the loop of `dtokd train`."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from timm.utils import random_seed

from ..files import read_weights
from ..objectives.task import DistillationTask
from ..report.page import write_report
from ..train.about import Known
from ..train.batches import Batches
from ..train.data import Data
from ..train.fit import Outcome, fit, opened
from ..train.options import experiment_name, flag
from ..train.progress import Progress
from ..train.rundir import RunDir
from ..train.world import World
from .annotations import Annotations
from .batch import blank
from .build import build
from .data import OnDevice, cached, first_images, make_loader, read_splits, small_boxes
from .detectors.base import Detector
from .detectors.build import check_directory, check_order, make_student
from .heldout import Detectors, split
from .pictures import draw_pictures

#: In pixels, of the objects that COCO's metrics by size count.
AREAS = {"ap_small": (0.0, 32.0**2), "ap_medium": (32.0**2, 96.0**2), "ap_large": (96.0**2, math.inf)}


def detect(options: argparse.Namespace, progress: Progress | None = None) -> Outcome:
    """Train a detector, or go on training, as the options say; under torchrun together with the other processes.

    Args:
        options: of `detect.options`.
        progress: what the user sees.

    Raises, Effects: as `dtokd.train.run.train`.
    """
    progress = progress or Progress(options.epochs)
    with opened(options, lambda: experiment_name(options).replace(":", "-"), progress) as (run, world):
        with world.agreed():
            task, loaders, device, card, known = prepare(options, run, world, progress)
        outcome = fit(options, run, task, loaders, device, progress, world, card, known)
        judged = loaders.validation
        if options.pictures and judged is not None and not (outcome.interrupted or options.dry_run):
            world.first_does(lambda: _draw(options, run, task, judged, card["label_names"]))
        return outcome


def prepare(
    options: argparse.Namespace, run: RunDir, world: World, progress: Progress
) -> tuple[DistillationTask, Data, torch.device, dict[str, Any], Known]:
    """What `fit` trains: task, loaders, their device, what the student is for `config.json`, and what else is known.

    Raises, Effects: as `detect`, but only skipped images are noted in the run's directory.
    """
    device = world.device(options.device)
    train, validation = read_splits(options)
    lines: list[str] = []
    for read in filter(None, (train, validation)):
        small = small_boxes(train, options) if read is train else 0
        lines += _told(read, small, options.img_size)
    for line in lines:
        progress.say(line)
    if validation is not None and not _judges(validation, options.eval_metric):
        progress.say(
            f"--eval-metric {options.eval_metric}: {validation.path.name} has no object of this size, so it is nan in "
            "all epochs and the last one counts as the best; ap would tell them apart"
        )
    of_student = ("pretrained", "backbone_checkpoint", "model_kwargs", "freeze_bn")
    check_directory(options.model, {flag(name): getattr(options, name) for name in of_student})
    random_seed(options.seed, 0)
    student = make_student(options, len(train.categories)).to(device)
    if not options.initial_checkpoint:
        check_order(student, list(train.categories.values()), options.model)
    shared: dict[str, Any] = {"device": device, "record": run.bad_images, "world": world}
    trained, held = split(options, train, world)
    learned = make_loader(options, trained, options.train_split, training=True, **shared)
    judged = make_loader(options, validation, options.val_split, training=False, **shared) if validation else None
    looked_at = make_loader(options, held, options.train_split, training=False, **shared) if held else None
    assert isinstance(learned.loader, Batches)
    task = build(options, student, train, validation, device, cached(options, learned.loader), world)
    world.apart(options.seed)
    loaders = Data(learned, judged, None, batches=learned.loader, held_out=looked_at)
    if held is not None:
        loaders.judges = Detectors(task, list(train.categories.values()), held, options.eval_metric)
    known = Known(lines, blank(options.img_size, device))
    return task, loaders, device, _card(options, student, train), known


def _draw(options: argparse.Namespace, run: RunDir, task: DistillationTask, judged: OnDevice, names: list[str]) -> None:
    """Show what the best student finds in the first images of the validation split."""
    if not run.student.exists():
        return
    student: Any = copy.deepcopy(task.get_eval_model())
    student.load_state_dict(read_weights(run.student, "--output"))
    draw_pictures(run.pictures, student, first_images(judged), names, options.pictures)
    write_report(run.path)


def _card(options: argparse.Namespace, student: Detector, train: Annotations) -> dict[str, Any]:
    """What a run's `config.json` says of its detector: classes in the order of its labels, and the preprocessing."""
    return {
        "architecture": options.model,
        "num_classes": len(train.categories),
        "label_names": list(train.categories.values()),
        "category_ids": list(train.categories),
        "model_args": options.model_kwargs,
        "input": {name: getattr(options, name) for name in ("img_size", "max_size", "square")}
        | {name: getattr(student, name).flatten().tolist() for name in ("mean", "std")},
    }


def _told(split: Annotations, small: int, img_size: int) -> Iterator[str]:
    """What is there, and one warning of all boxes that cannot be learned as they are written."""
    boxes, name = split.boxes, split.path.name
    parts = [f"{len(split.image_ids)} images, {len(split.categories)} categories, {boxes.objects} boxes"]
    parts += [f"{split.empty} images without a box"] if split.empty else []
    parts += [f"{boxes.crowds} crowd regions, ignored"] if boxes.crowds else []
    yield f"{name}: {', '.join(parts)}"
    counted = (
        (boxes.degenerate, "have no area, so nobody learns or finds them"),
        (boxes.outside, "are outside their image, so nobody learns or finds them"),
        (boxes.cut, "reach beyond their image, where training cuts them"),
        (boxes.repeated, "are there twice, with the same class, so one of them is missed"),
        (small, f"are less than a pixel wide or high at --img-size {img_size}, where training drops them"),
    )
    if any(count for count, _ in counted):
        found = "; ".join(f"{count} {text}" for count, text in counted if count)
        yield f"{name}: warning: of {boxes.objects} boxes {found}"
    if split.repeated:
        yield (
            f"{name}: warning: {split.repeated} images are listed more than once, by the name of their file; if each "
            "entry has a part of the boxes, bring them together"
        )


def _judges(split: Annotations, metric: str) -> bool:
    """Whether there is an object that the metric is about."""
    low, high = AREAS.get(metric, (0.0, math.inf))
    return any(low <= a["area"] <= high for a in split.content["annotations"] if not a["iscrowd"])
