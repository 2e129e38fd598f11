"""From a name to a detector: vidt_SIZE, fcos:, retinanet: or rtdetr:BACKBONE, a directory of transformers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor

from ...errors import UsageError, reason_of
from ...files import load_weights, read_weights
from . import deformable, rtdetr
from .base import Detector
from .dense import Dense, make_backbone
from .hf import HFDetector, load_folder

DENSE = ("fcos", "retinanet")
#: What a timm backbone can follow, as KIND:BACKBONE, and the arguments of each.
ON_TIMM = {
    **dict.fromkeys(DENSE, "known are width (a multiple of 32), score_thresh, nms_thresh"),
    "rtdetr": "those of transformers' RTDetrConfig are known",
}


def make_student(options: argparse.Namespace, classes: int) -> Detector:
    """The student that the options name, with its first weights.

    Raises:
        UsageError: no such detector, or weights that are not there or do not fit.
    """
    student = _make(
        options.model,
        classes,
        options.model_kwargs,
        "--model",
        pretrained=options.pretrained,
        backbone=options.backbone_checkpoint,
        freeze_norm=options.freeze_bn,
        image_size=options.img_size,
    )
    if student.classes != classes:
        raise UsageError(
            f"--model: {options.model} has {student.classes} classes, the data {classes}; a checkpoint directory "
            "serves as student for its own classes only, and as teacher for any"
        )
    if options.initial_checkpoint:
        load_weights(student, options.initial_checkpoint, "--initial-checkpoint", options.model)
    return student


def check_order(student: Detector, classes: Sequence[str], name: str) -> None:
    """Refuse a checkpoint directory as student whose classes are the data's in another order.

    Args:
        student: with the directory's weights.
        classes: the data's names, in the order of the labels.
        name: of the directory.

    Raises:
        UsageError: the student would begin with each class's weights for another one.
    """
    if not isinstance(student, HFDetector):
        return
    known = [student.class_names[label].lower() for label in sorted(student.class_names)]
    own = [text.lower() for text in classes]
    if known != own and sorted(known) == sorted(own):
        first = next(label for label, pair in enumerate(zip(known, own, strict=True)) if pair[0] != pair[1])
        raise UsageError(
            f"--model: class {first} is {own[first]!r} in the data, but {known[first]!r} in {name}; give "
            "the categories ids in the directory's order"
        )


def check_directory(name: str, given: Mapping[str, Any]) -> None:
    """Refuse what changes a detector, where it is a checkpoint directory, which holds the whole of it.

    Args:
        name: of the detector.
        given: values of options, by their names.

    Raises:
        UsageError: one of them has a value that would have no effect.
    """
    told = [option for option, value in given.items() if value]
    if told and Path(name).is_dir():
        raise UsageError(
            f"{', '.join(told)}: no effect on the checkpoint directory {name}, which holds the whole detector; change "
            "its config.json, or leave it out"
        )


def is_detector(name: str) -> bool:
    """Whether a teacher's name is that of a detector; else it is one of timm's models, read for its features."""
    kind, _, backbone = name.partition(":")
    return (kind in ON_TIMM and bool(backbone)) or name in deformable.SIZES or Path(name).is_dir()


def make_teacher(options: argparse.Namespace, name: str, path: str | None, classes: Sequence[str]) -> Detector:
    """A detector as teacher, frozen, in evaluation mode; its classes are put into the data's order.

    Args:
        options: image size and arguments.
        name: of the detector.
        path: its weights, which a directory holds itself.
        classes: the data's names.

    Raises:
        UsageError: as `make_student`, or there are no weights.
    """
    if not path and not Path(name).is_dir():
        raise UsageError(f"--kd-teacher-path: missing; pass the weights of the teacher {name}")
    teacher = _make(name, len(classes), options.kd_model_kwargs, "--kd-model-name", image_size=options.img_size)
    if path:
        load_weights(teacher, path, "--kd-teacher-path", name)
    return teacher.eval().requires_grad_(False)


def _make(name: str, classes: int, changes: dict[str, Any], option: str, **more: Any) -> Detector:
    kind, _, backbone = name.partition(":")
    if kind in ON_TIMM and backbone:
        weights: dict[str, Any] = {"pretrained": bool(more.get("pretrained") or more.get("backbone"))}
        if more.get("backbone"):
            read_weights(more["backbone"], "--backbone-checkpoint")  # timm's own errors do not say which file
            weights["pretrained_cfg_overlay"] = {"file": more["backbone"]}
        body = make_backbone(backbone, weights, more.get("image_size"))
        if more.get("freeze_norm"):
            body = freeze_batch_norm_2d(body)
        try:
            if kind == "rtdetr":
                return rtdetr.make(backbone, body, classes, changes)
            return Dense(kind, body, classes, **changes)
        except Exception as error:  # what torchvision and torch raise is of every kind
            kwargs = "--model-kwargs" if option == "--model" else "--kd-model-kwargs"
            raise UsageError(f"{option}, {kwargs}: {reason_of(error)}; {ON_TIMM[kind]}") from error
    if name in deformable.SIZES:
        given = {key: more[key] for key in ("pretrained", "backbone") if more.get(key)}
        return deformable.make(name, classes, changes, **given)
    if Path(name).is_dir():
        return load_folder(Path(name), option)
    raise UsageError(
        f"{option}: {name!r} is neither {', '.join(deformable.SIZES)}, nor {': or '.join(ON_TIMM)}: and a timm "
        "backbone (fcos:resnet18), nor a checkpoint directory of transformers"
    )


def columns(teacher: Detector, classes: Sequence[str]) -> Tensor | None:
    """Which of the teacher's classes are the data's.

    Args:
        teacher: a checkpoint directory names its classes; any other was trained with the data's.
        classes: the data's names.

    Returns:
        [classes] indices; None if the teacher does not know all of them.
    """
    if not isinstance(teacher, HFDetector):
        return torch.arange(len(classes)) if teacher.classes == len(classes) else None
    names = {name.lower(): index for index, name in teacher.class_names.items()}
    if all(name.lower() in names for name in classes):
        return torch.tensor([names[name.lower()] for name in classes])
    ours = {f"label_{i}" for i in range(len(classes))}
    return torch.arange(len(classes)) if set(names) == ours else None
