"""From the options of `dtokd train --data-free` to batches for the student."""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import unwrap_model

from ..card import read_card
from ..errors import UsageError
from ..objectives.build import PRETRAINED
from ..objectives.taps import Taps, read
from ..objectives.task import DistillationTask
from ..objectives.teacher import as_list
from ..train.found import class_names, some
from ..train.world import World
from ..values import LOOKING
from .augment import Augment
from .balance import parse_balance
from .bank import Bank, bytes_of
from .generator import MULTIPLE, Generator
from .loader import SyntheticBatches
from .losses import ImageLosses, pixel_prior
from .options import check, complete
from .statistics import BatchStatistics, NoStatistics
from .synthesis import Fast, Inversion, Settings


def resolve(options: argparse.Namespace) -> None:
    """Check the options of --data-free, and set those that were not given: the method's, and what the teacher says.

    Number of classes, size and normalisation of the images are the teacher's where the options do not name them.

    Args:
        options: of `train.options`, whose teachers are resolved; without --data-free nothing happens.

    Raises:
        UsageError: options contradict each other, or classes or size cannot be known.
    """
    if options.data_free is not None and options.kd_balance in LOOKING:
        raise UsageError(
            f"--kd-balance: {options.kd_balance} looks at held-out images, which --data-free has none of; choose "
            "another rule, such as famo"
        )
    check(options)
    if options.data_free is None:
        return
    complete(options)
    names, paths = as_list(options.kd_model_name), as_list(options.kd_teacher_path)
    if len(names) != 1:
        raise UsageError(f"--data-free: images are made from one teacher; --kd-model-name names {len(names)}")
    told = _told(names[0], paths[0] if paths else PRETRAINED)
    if options.num_classes is None:
        if not told.get("num_classes"):
            raise UsageError(f"--num-classes: the number of classes of the teacher {names[0]} is not known; pass it")
        options.num_classes = told["num_classes"]
    size = told.get("input_size")
    if options.in_chans is None and size:
        options.in_chans = options.input_size[0] if options.input_size else size[0]
    if options.img_size is None and options.input_size is None:
        if not size:
            raise UsageError(
                f"--img-size: the size of the images that trained the teacher {names[0]} is not known; pass "
                "it, or --input-size, or the run's directory as --kd-teacher-path"
            )
        if size[1] == size[2]:
            options.img_size = size[1]
        else:
            options.input_size = [options.in_chans, *size[1:]]
    for name in ("mean", "std"):
        if getattr(options, name) is None and told.get(name) is not None and len(told[name]) == (options.in_chans or 3):
            setattr(options, name, list(told[name]))


def _told(name: str, path: str) -> Mapping[str, Any]:
    """Of a teacher that is not made yet: num_classes, input_size, mean, std; nothing of a file of weights."""
    if path != PRETRAINED and os.path.isdir(path):
        card = read_card(path, "--kd-teacher-path")
        return {"num_classes": card.get("num_classes"), **card["pretrained_cfg"]}
    if path != PRETRAINED:
        return {}
    cfg: Any = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return {} if cfg is None else cfg.to_dict()


def classes_of(options: argparse.Namespace, world: World, images: Any | None) -> tuple[int, list[str] | None]:
    """The number of classes, and their names where the images to be judged by, or the teacher's run, say.

    Args:
        options: of `resolve`.
        world: the processes that train together.
        images: the validation split; None without one.

    Raises:
        UsageError: the images have other classes than the teacher, or several processes train.
    """
    if world.joined:
        raise UsageError("--data-free: one process makes the images; start it without torchrun")
    names = None if images is None else class_names(images)
    if names is not None and len(names) != options.num_classes:
        raise UsageError(
            f"--val-split: {options.val_split!r} has {len(names)} classes ({some(names)}), the teacher "
            f"{options.num_classes}; judge on images of the teacher's classes, or pass --val-split ''"
        )
    path = next(iter(as_list(options.kd_teacher_path)), PRETRAINED)
    known = read_card(path, "--kd-teacher-path").get("label_names") if os.path.isdir(path) else None
    if names is not None and known is not None and known != names:
        raise UsageError(
            f"--val-split: {options.val_split!r} has the classes {some(names)}, the teacher {some(known)}, so that its "
            "labels would not mean the same; judge on images of the teacher's classes, or pass --val-split ''"
        )
    return options.num_classes, known if names is None else names


def make_batches(
    options: argparse.Namespace,
    task: DistillationTask,
    config: Mapping[str, Any],
    device: torch.device,
    say: Callable[[str], None],
    checkpoints: Iterable[Path] = (),
) -> SyntheticBatches:
    """What the student of a task learns from.

    Args:
        options: of `resolve`.
        task: with a teacher.
        config: of `card.input_config`.
        device: of student and images.
        say: takes a line for the user.
        checkpoints: that the run has already.

    Raises:
        UsageError: the teacher has no statistics or other classes, the images have a size that cannot be made, or the
            bank does not fit on the disk.
    """
    size = tuple(config["input_size"])
    teacher, _ = task.lessons[0]
    student = unwrap_model(task.get_trainable_module()).student
    theirs = getattr(unwrap_model(teacher.model), "num_classes", None)
    if theirs != options.num_classes:
        raise UsageError(
            f"--num-classes: {options.num_classes}, but the teacher {teacher.name!r}, from which images and their "
            f"labels are made, has {theirs or 'no'} classes; pass {theirs or 'a teacher with a classifier'}"
        )
    try:
        statistics = BatchStatistics(teacher.model, options.df_momentum)
    except NoStatistics as error:
        raise UsageError(f"--data-free: the teacher {teacher.name!r}: {error}") from error
    _check_size(options, size)
    _check_room(options, size, sum(path.stat().st_size for path in checkpoints))
    gram = options.df_balance_gram
    rule = parse_balance(options.df_balance)
    prior = pixel_prior(options.df_prior_tv, options.df_prior_l2) if options.data_free == "inversion" else None

    def of_teacher(images: torch.Tensor) -> torch.Tensor:
        view = teacher.view(images)
        logits = read(
            teacher.model, view if teacher.dtype is None else view.to(teacher.dtype), Taps(logits=True)
        ).logits
        assert logits is not None
        return logits

    def of_student(images: torch.Tensor) -> torch.Tensor:
        logits = read(student, images, Taps(logits=True)).logits
        assert logits is not None
        return logits

    logarithms = getattr(rule, "log_gradients", True)
    losses = ImageLosses(of_teacher, of_student, statistics, options.df_disagreement, logarithms, prior)
    shift = round(size[1] / 16) if options.df_shift is None else options.df_shift
    flips = (0.0, 0.0) if options.no_aug else (options.hflip, options.vflip)
    augment = Augment(0 if options.no_aug else shift, *flips)
    settings = Settings(
        size=size,
        mean=config["mean"],
        std=config["std"],
        classes=options.num_classes,
        batch=options.df_batch_size,
        steps=options.df_steps,
        lr=options.df_lr,
        augment=augment,
        device=device,
    )
    made: Any
    try:
        if options.data_free == "fast":
            generator = Generator(size, options.df_latent_dim, options.df_width)
            made = Fast(
                settings, losses, rule, generator, latent_lr=options.df_latent_lr, rate=options.df_rate, gram=gram
            )
        else:
            made = Inversion(settings, losses, rule, gram)
    except ValueError as error:
        raise UsageError(f"--df-balance-gram {options.df_balance_gram}: {error}") from error
    return SyntheticBatches(
        made,
        settings,
        Bank(options.df_bank, size, device),
        student,
        of_teacher,
        augment,
        count=options.df_iterations,
        batch_size=options.batch_size,
        every=options.df_every,
        warmup=options.df_warmup,
        balance=options.df_balance,
        say=say,
    )


def _check_size(options: argparse.Namespace, size: tuple[int, ...]) -> None:
    if options.data_free == "fast" and any(side % MULTIPLE for side in size[1:]):
        raise UsageError(
            f"--img-size: {size[1]} x {size[2]}, but the generator makes images whose sides are multiples of "
            f"{MULTIPLE}; pass {math.ceil(size[1] / MULTIPLE) * MULTIPLE}, or --data-free inversion"
        )


def _check_room(options: argparse.Namespace, size: tuple[int, ...], there: int) -> None:
    """Raises UsageError: the checkpoints that are kept, each with a full bank, are larger than what is free.

    Args:
        options: of the run.
        size: of an image.
        there: bytes of the run's checkpoints, which later ones replace.
    """
    files = options.checkpoint_hist + 2  # one that is being written, and the best one
    need = files * bytes_of(options.df_bank, size) - there  # type: ignore[arg-type]
    folder = next(path for path in (options.output, *Path(options.output).absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if need > free and not options.dry_run:
        more = " more" if there else ""
        raise UsageError(
            f"--df-bank: {options.df_bank} images are a part of each checkpoint, and {files} of these need "
            f"{need / 2**30:.3g} GiB{more}, but {folder} has {free / 2**30:.3g} GiB free; pass a smaller --df-bank or "
            "--checkpoint-hist, or another --output"
        )
