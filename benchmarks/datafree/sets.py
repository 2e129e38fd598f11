"""The sets of images that the evidence has, each with a teacher that images can be made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ..digits import ROLES, Images, accuracy, make_model
from ..evidence.data import (
    PHOTOS,
    draw_silhouettes,
    fit_classifier,
    imagenet_mobilenet,
    mobilenet_features,
    photo_crops,
    shrunk,
    silhouettes_teacher,
)


@dataclass(frozen=True)
class World:
    """What a student without data could be trained in.

    Attributes:
        teacher: a frozen network with batch normalisation; images [B, C, H, W] in [-1, 1] to logits.
        student: makes a new one, from torch's random numbers.
        classes: of teacher and student.
        images: real ones, without labels, for the student that has data.
        validation, test: with labels, to choose by and to judge by.
        teacher_accuracy: on the test images, in percent.
    """

    teacher: nn.Module
    student: Callable[[], nn.Module]
    classes: int
    images: Tensor
    validation: Images
    test: Images
    teacher_accuracy: float

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width of all images, also of those that are made."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width


def load(name: str, folder: Path) -> World:
    """One of `MAKERS`; the teacher's weights are read from the folder if they were made before, else written."""
    world = MAKERS[name](_Kept(folder / f"{name}, teacher to make images from.safetensors"))
    world.teacher.to(memory_format=torch.channels_last)  # quicker on a CPU
    return world


@dataclass(frozen=True)
class _Kept:
    """A file of weights."""

    path: Path

    def __call__(self, model: nn.Module, trained: Callable[[], nn.Module]) -> nn.Module:
        """The model with the weights on file, or of a model that is trained now."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: value.contiguous() for key, value in trained().state_dict().items()}, self.path)
        model.load_state_dict(load_file(self.path))
        return model.eval().requires_grad_(False)


def silhouettes(name: str, kept: _Kept) -> World:
    """Digits or animals, grey, 28 x 28 pixels."""
    parts = draw_silhouettes(name)
    teacher = kept(make_model("teacher"), lambda: silhouettes_teacher(parts.taught))
    return World(
        teacher,
        partial(make_model, "student"),
        10,
        parts.pool.images,
        parts.validation,
        parts.test,
        100 * accuracy(teacher, parts.test),
    )


def photos(kept: _Kept) -> World:
    """Which of 16 photos a crop of 32 x 32 pixels is from, for ImageNet's MobileNetV2 with a linear classifier.

    In the evidence this teacher sees them larger. Here both see the images as they are made.
    """
    crops = {part: (shrunk(images), labels) for part, (images, labels) in photo_crops().items()}
    network: Any = imagenet_mobilenet()

    def fitted() -> nn.Module:
        return fit_classifier(mobilenet_features(network, crops["train"][0]), crops["train"][1])

    classifier = kept(nn.Linear(network.num_features, len(PHOTOS)), fitted)
    teacher = nn.Sequential(_ForImageNet(), network, classifier).eval()
    parts = {part: Images(images * 2 - 1, labels) for part, (images, labels) in crops.items()}
    with torch.no_grad():
        right = torch.cat([teacher(some).argmax(1) for some in parts["test"].images.split(100)]) == parts["test"].labels
    return World(
        teacher,
        partial(timm.create_model, "test_resnet", num_classes=len(PHOTOS), **ROLES["student"]),
        len(PHOTOS),
        parts["train"].images,
        parts["validation"],
        parts["test"],
        100 * float(right.double().mean()),
    )


class _ForImageNet(nn.Module):
    """From [-1, 1] to the normalisation of ImageNet's networks."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return ((images + 1) / 2 - self.mean) / self.std


#: The sets.
MAKERS: dict[str, Callable[[_Kept], World]] = {
    "digits": partial(silhouettes, "digits"),
    "animals": partial(silhouettes, "animals"),
    "photos": photos,
}
#: Images of another kind, which a student of the set can be taught on in place of its own.
OTHER = {"digits": "animals", "animals": "digits"}
