"""`dtokd eval` on a run of `dtokd detect`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from ..card import CARD, read_card
from ..errors import UsageError
from ..files import load_weights
from ..train.engine import autocast, evaluate
from ..train.found import some
from ..train.images import new_record, skipped
from ..train.world import World
from .data import make_loader, read_split
from .detectors.build import make_student
from .evaluate import CocoEvaluator


def judge(run: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A detector on a split: what `dtokd.evaluate.measure` returns.

    Args:
        run: the run's args.yaml.
        given: of the command line: run_dir, and perhaps checkpoint, data_dir, val_split, batch_size, workers, device.

    Raises:
        UsageError: no such weights or data, or they do not fit.
    """
    options = argparse.Namespace(**{**run, **given, "pretrained": False, "backbone_checkpoint": ""})
    options.initial_checkpoint = ""
    if not options.val_split:
        raise UsageError("dtokd eval: the run has no validation split; pass --val-split")
    weights = given.get("checkpoint") or Path(given["run_dir"]) / "student.safetensors"
    split = read_split(options, options.val_split)
    _check_classes(Path(given["run_dir"]), options.val_split, list(split.categories.values()))
    device = World().device(options.device)
    student = make_student(options, len(split.categories))
    load_weights(student, weights, "--checkpoint", options.model)
    record = new_record(Path(given["run_dir"]))
    loader = make_loader(options, split, options.val_split, training=False, device=device, record=record)
    metrics = evaluate(student.to(device), loader, CocoEvaluator(split), partial(autocast, options, device))
    images = len(split.content["images"])
    result = {"model": options.model, "weights": str(weights), **metrics, "images": images}
    if bad := skipped(record):
        result["skipped_images"] = len(bad)
    return result


def _check_classes(run: Path, split: str, names: list[str]) -> None:
    """Raises UsageError: the split's labels mean other classes than the run's."""
    known = read_card(run, "dtokd eval", detects=True)["label_names"] if (run / CARD).exists() else names
    if known != names:
        raise UsageError(
            f"dtokd eval: {split!r} has the categories {some(names)}, the run {some(known)}; labels would not mean the "
            "same"
        )
