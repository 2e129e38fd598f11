"""`dtokd eval`: a student's accuracy on a split, with timm's preprocessing; a detector's AP."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import timm
from timm.task import ClassificationEvaluator

from .card import CARD, input_config, read_card
from .errors import UsageError
from .files import as_json, load_weights
from .settings import settings_of
from .train import data
from .train.engine import autocast, evaluate
from .train.found import class_names, some
from .train.images import new_record, skipped
from .train.options import flag
from .train.reading import check
from .train.student import check_size, make_student
from .train.world import World


def run(options: argparse.Namespace, defaults: dict[str, Any]) -> dict[str, Any]:
    """Evaluate, print one JSON line, and return it: see `measure`."""
    result = measure(options, defaults)
    print(as_json(result))
    return result


def measure(options: argparse.Namespace, defaults: dict[str, Any]) -> dict[str, Any]:
    """A student on a split.

    Args:
        options: of the command line: `run_dir`, or `model` and `checkpoint`; where the data is.
        defaults: of `dtokd train`, for options that a run directory does not hold.

    Returns:
        model, weights, the metrics, images, and skipped_images if there are any.

    Raises:
        UsageError: no such run, model, weights or data, or they do not fit each other.
    """
    given = _given(options)
    if given.get("pretrained") and (own := options.checkpoint or options.run_dir) is not None:
        raise UsageError(f"--pretrained: the weights come from {own}; give the one or the other")
    told = {} if options.run_dir is None else settings_of(options.run_dir, "dtokd eval")
    if "annotations" in told:
        from .detect.judge import judge

        foreign = [flag(name) for name in given if name not in ("run_dir", "checkpoint", *told)]
        if foreign:
            raise UsageError(
                f"{', '.join(foreign)}: for classifiers, but {options.run_dir} holds a detector; leave it out"
            )
        return judge(told, given)
    settings = argparse.Namespace(**{**defaults, **told, **given})
    check(settings)
    weights = options.checkpoint
    if weights is None and options.run_dir is not None:
        weights = options.run_dir / "student.safetensors"
    if weights is None and not settings.pretrained:
        raise UsageError("dtokd eval: no weights; give a run directory, --checkpoint, or --pretrained")
    device = World().device(settings.device)
    record = None if options.run_dir is None else new_record(options.run_dir)
    images = data.open_dataset(settings, settings.val_split, record)
    names = class_names(images)
    classes = settings.num_classes or (None if names is None else len(names))
    settings.initial_checkpoint, settings.grad_checkpointing = "", False
    settings.pretrained = settings.pretrained and weights is None
    student = make_student(settings, settings.num_classes if weights is None else classes)
    if weights is not None:
        load_weights(student, weights, "--checkpoint", settings.model)
    if names is not None and len(names) != student.num_classes:
        raise UsageError(
            f"dtokd eval: the model has {student.num_classes} classes, {settings.val_split!r} has {len(names)}; give "
            "the split it was trained for, or a --class-map"
        )
    if names is not None and options.run_dir is not None and (options.run_dir / CARD).exists():
        known = read_card(options.run_dir, "dtokd eval").get("label_names")
        if known is not None and known != names:
            raise UsageError(
                f"dtokd eval: {settings.val_split!r} has the classes {some(names)}, the run {some(known)}; "
                "labels would not mean the same"
            )
    config = input_config(settings, student)
    check_size(student.to(device), config["input_size"], device)
    loader = data.validation_loader(settings, images, config, device)
    evaluator = ClassificationEvaluator(device=device)
    metrics = evaluate(student, loader, evaluator, partial(autocast, settings, device))
    result = {"model": settings.model, "weights": str(weights or timm.__version__), **metrics, "images": len(images)}
    if record is not None and (bad := skipped(record)):
        result["skipped_images"] = len(bad)
    return result


def _given(options: argparse.Namespace) -> dict[str, Any]:
    given = {key: value for key, value in vars(options).items() if value is not None and key not in ("command",)}
    if "batch_size" in given:
        given["validation_batch_size"] = None  # the run's would count instead
    return given
