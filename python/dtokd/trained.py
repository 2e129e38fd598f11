"""The student of a run, made from the run's directory alone: for `dtokd predict` and `dtokd export`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from . import networks as _networks  # noqa: F401  registers CIFAR's with timm
from .card import CARD, read_card
from .errors import UsageError, reason_of
from .files import load_weights
from .settings import settings_of

STUDENT = "student.safetensors"


@dataclass(frozen=True)
class Trained:
    """A run's student in evaluation mode.

    Attributes:
        run: the directory.
        settings: the run's options.
        card: its `config.json`.
        weights: the file that was loaded.
        model: a timm classifier, or a `detect.detectors.base.Detector`.
    """

    run: Path
    settings: argparse.Namespace
    card: dict[str, Any]
    weights: Path
    model: Any

    @property
    def detects(self) -> bool:
        """Whether it is a detector."""
        return "category_ids" in self.card

    @property
    def names(self) -> list[str]:
        """Of the classes, in the order of the labels; their numbers where the data had no names."""
        count = int(self.card["num_classes"])
        return [str(name) for name in self.card.get("label_names") or range(count)]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of a classifier's images."""
        channels, height, width = self.model.pretrained_cfg["input_size"]
        return int(channels), int(height), int(width)


def load_trained(run: Path, command: str, checkpoint: Path | None = None) -> Trained:
    """The best student of a run.

    Args:
        run: the directory.
        command: that asks, for messages.
        checkpoint: other weights of the same model.

    Raises:
        UsageError: it is no run directory, no epoch is finished, or a file does not fit.
    """
    settings = settings_of(run, command)
    weights = checkpoint or run / STUDENT
    if checkpoint is None and not weights.exists():
        raise UsageError(f"{command}: {run} has no {STUDENT} yet: no epoch is finished; train on with --resume auto")
    option = command if checkpoint is None else "--checkpoint"
    options = argparse.Namespace(**settings)
    if "annotations" in settings:
        card = read_card(run, command, detects=True)
        model: nn.Module = _detector(options, card, weights, option)
    else:
        card = read_card(run, command)
        model = _classifier(run, weights, command, option)
    return Trained(run, options, card, weights, model.eval().requires_grad_(False))


def _classifier(run: Path, weights: Path, command: str, option: str) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(f"local-dir:{run}")
    except Exception as error:  # what timm and its models raise is of every kind
        raise UsageError(f"{command}: {run / CARD}: {reason_of(error)}") from error
    load_weights(model, weights, option, f"the model of {run}")
    return model


def _detector(options: argparse.Namespace, card: dict[str, Any], weights: Path, option: str) -> nn.Module:
    from .detect.detectors.build import make_student

    options.pretrained, options.backbone_checkpoint, options.initial_checkpoint = False, "", ""
    student = make_student(options, int(card["num_classes"]))
    load_weights(student, weights, option, options.model)
    # those that the run has used
    for name in ("mean", "std"):
        getattr(student, name).copy_(torch.tensor(card["input"][name]).view(3, 1, 1))
    return student
