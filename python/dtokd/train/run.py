"""A run of `dtokd train`, from its options to its directory."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from timm.task import create_classification_loss
from timm.utils import random_seed
from torch import nn

from ..card import input_config, make_card
from ..datafree import build as datafree
from ..errors import UsageError
from ..objectives.build import build
from ..objectives.task import DistillationTask
from ..objectives.teacher import resolve_teachers
from . import data, heldout
from .about import Known
from .fit import Outcome, fit, opened
from .found import class_names, examine
from .options import experiment_name
from .progress import Progress
from .rundir import RunDir
from .student import check_size, make_student
from .world import World


def train(options: argparse.Namespace, progress: Progress | None = None) -> Outcome:
    """Train, or go on training, with these options; under torchrun together with the other processes.

    Args:
        options: of `train.options`.
        progress: what the user sees.

    Raises:
        UsageError: an option, the data, a model or a checkpoint is of no use, or the disk is full.
        RuntimeError: another process has ended, or does not answer.

    Effects: seeds the random generators of Python, numpy and torch; writes the run's directory; while it runs,
        Ctrl-C and SIGTERM end it after the current step.
    """
    progress = progress or Progress(options.epochs)

    def name() -> str:
        resolve_teachers(options)
        datafree.resolve(options)
        return experiment_name(options)

    with opened(options, name, progress) as (run, world):
        with world.agreed():
            task, loaders, device, card, known = prepare(options, run, world, progress)
        return fit(options, run, task, loaders, device, progress, world, card, known)


def prepare(
    options: argparse.Namespace, run: RunDir, world: World, progress: Progress
) -> tuple[DistillationTask, data.Data, torch.device, dict[str, Any], Known]:
    """What `fit` trains: task, loaders, their device, what the student is for `config.json`, and what else is known.

    Raises, Effects: as `train`, but only skipped images are noted in the run's directory.
    """
    device = world.device(options.device)
    train_images, validation_images = _open(options, run, world)
    lines: list[str] = []
    for images, split in ((train_images, options.train_split), (validation_images, options.val_split)):
        if images is not None and world.first:
            lines.append(examine(images, split))
            progress.say(lines[-1])
    if options.data_free:
        classes, names = datafree.classes_of(options, world, validation_images)
        lines.append(f"training: no images; they are made from the teacher (--data-free {options.data_free})")
    else:
        classes = data.number_of_classes(options, train_images, validation_images)
        names = class_names(train_images)
    random_seed(options.seed, 0)  # student and heads begin alike on all ranks, also what DDP does not send
    student: Any = make_student(options, classes).to(device)
    config = input_config(options, student)
    check_size(student, config["input_size"], device, options.batch_size)
    card = make_card(options.model, student, config, names)
    # timm's tasks translate the student's normalization into the teacher's: it has to be the one in use
    student.pretrained_cfg = {**student.pretrained_cfg, "mean": config["mean"], "std": config["std"]}
    if options.data_free:
        judged = None
        if validation_images is not None:
            judged = data.validation_loader(options, validation_images, config, device)
        loaders = data.Data(None, judged, None)
    else:
        train_images, held_out = heldout.split(options, train_images)
        loaders = data.make_loaders(
            options, train_images, validation_images, config, student.num_classes, device, world.joined, held_out
        )
    task = _make_task(options, student, loaders, device, config["input_size"], names)
    if options.data_free:
        made = datafree.make_batches(options, task, config, device, progress.say, run.checkpoints().values())
        loaders.train = loaders.batches = loaders.synthetic = made
    loaders.judges = heldout.Classifiers(task, names)
    world.apart(options.seed)
    example = torch.zeros(1, *config["input_size"], device=device)
    return task, loaders, device, card, Known(lines, example)


def _open(options: argparse.Namespace, run: RunDir, world: World) -> tuple[Any, Any]:
    """Both splits; of each machine's processes one downloads them, before the others look."""
    waits = options.dataset_download and world.local_rank != 0
    if waits:
        world.barrier()
    judges = options.val_split and not (options.data_free and options.data_dir is None and not options.dataset)
    try:
        train_images = None
        if not options.data_free:
            train_images = data.open_dataset(options, options.train_split, run.bad_images)
        return train_images, data.open_dataset(options, options.val_split, run.bad_images) if judges else None
    finally:
        if options.dataset_download and not waits:
            world.barrier()


def _make_task(
    options: argparse.Namespace,
    student: nn.Module,
    loaders: data.Data,
    device: torch.device,
    input_size: tuple[int, int, int],
    names: list[str] | None,
) -> DistillationTask:
    """Raises UsageError: a teacher cannot be loaded, or does not fit the student."""
    try:
        task = build(
            options,
            student,
            _criterion(options, loaders),
            device=device,
            dtype=torch.float32,
            names_of_classes=names,
            images=loaders.cached,
        )
        task.check(torch.zeros(2, *input_size, device=device))
    except OSError as error:
        raise UsageError(f"--kd-teacher-path, --kd-cache-teacher: {error}") from error
    return task


def _criterion(options: argparse.Namespace, loaders: data.Data) -> nn.Module:
    return create_classification_loss(
        loss_type="bce" if options.bce_loss else "ce",
        smoothing=options.smoothing,
        soft_targets=loaders.mixup is not None,
        bce_target_thresh=options.bce_target_thresh,
    )
