"""The student that the options name."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import timm
import torch
from torch import nn

from .. import networks as _networks  # noqa: F401  registers CIFAR's with timm
from ..errors import UsageError, reason_of
from ..files import load_weights
from .options import flag


def make_student(options: argparse.Namespace, classes: int | None) -> Any:
    """The student that the options name: a timm model.

    Raises:
        UsageError: timm has no such model, it refuses an option, or its weights cannot be loaded.
    """
    if not timm.is_model(options.model.split("/")[-1]) and ":" not in options.model:
        raise UsageError(f"--model: timm has no model {options.model!r}; timm.list_models('*part*') finds names")
    keywords = {
        "pretrained": options.pretrained,
        "num_classes": classes,
        "in_chans": options.in_chans,
        "drop_rate": options.drop,
        "drop_path_rate": options.drop_path,
        "img_size": options.img_size,
        **options.model_kwargs,
    }
    keywords = {key: value for key, value in keywords.items() if value is not None}
    try:
        try:
            student = timm.create_model(options.model, **keywords)
        except TypeError:
            if "img_size" not in keywords:
                raise
            del keywords["img_size"]  # a convolutional model takes any
            student = timm.create_model(options.model, **keywords)
    except Exception as error:  # what timm and its models raise is of every kind
        reason = reason_of(error)
        names = ("in_chans", "drop", "drop_path", "img_size", "model_kwargs")
        given = [f"{flag(name)} {value}" for name in names if (value := getattr(options, name))]
        raise UsageError(f"{', '.join([f'--model {options.model}', *given])}: {reason}") from error
    if options.initial_checkpoint:
        load_weights(student, options.initial_checkpoint, "--initial-checkpoint", options.model)
    if options.grad_checkpointing:
        try:
            student.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, ValueError, TypeError) as error:
            raise UsageError(f"--grad-checkpointing: {options.model} has none; leave it out") from error
    return student


@torch.no_grad()
def check_size(student: nn.Module, size: tuple[int, int, int], device: torch.device, batch_size: int = 0) -> None:
    """Show the student one image, so that a size which it does not take is found before training.

    Args:
        student: on `device`; it is in evaluation mode afterwards.
        size: of the images: channels, height, width.
        device: of the student.
        batch_size: that it is to be trained with; 0 if it is not trained.

    Raises:
        UsageError: it does not, or its batch normalization cannot be trained with batches of one image.
    """
    try:
        image = torch.zeros(1, *size, device=device)
        student.eval()(image)
    except Exception as error:
        raise UsageError(
            f"--img-size, --input-size, --in-chans: the model does not take images of {tuple(size)}: {reason_of(error)}"
        ) from error
    if batch_size == 1:
        try:
            copy.deepcopy(student).train()(image)
        except ValueError as error:  # of a layer that normalizes over batch, height and width
            raise UsageError(
                f"--batch-size: 1, but the model needs more images to normalize by; pass 2 or more ({reason_of(error)})"
            ) from error
