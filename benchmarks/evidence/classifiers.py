"""Students that classify images."""

from __future__ import annotations

from typing import Any

import timm
import torch
from dtokd.objectives.taps import Outputs, Taps, in_float32
from dtokd.objectives.task import Trainable
from dtokd.train.heldout import frozen_statistics
from timm.models.resnet import BasicBlock
from torch import Generator, Tensor, nn

from ..digits import BATCH, ROLES, accuracy
from .data import DataSet
from .methods import OBJECTIVES
from .pupil import Pupil

#: timm models of the students that are not ResNets of 40 thousand parameters, by the setting's name.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smaller student": ("test_resnet", {"block": BasicBlock, "channels": (4, 8, 16, 16), "stem_width": 4}),
    "larger student": ("test_resnet", {"block": BasicBlock, "channels": (16, 32, 64, 64), "stem_width": 8}),
    "another student": ("test_efficientnet", {}),
}
RESNET = ("test_resnet", ROLES["student"])


class Classifying(Pupil):
    """A new classifier, drawn from torch's random numbers.

    Args:
        data: what it learns.
        objective: of `OBJECTIVES`; "" without a teacher.
        model: of `MODELS`; "" for the ResNet.
    """

    batch = BATCH

    def __init__(self, data: DataSet, objective: str, model: str) -> None:
        name, options = MODELS.get(model, RESNET)
        self.student: Any = timm.create_model(
            name, in_chans=data.images.shape[1], num_classes=data.logits.shape[1], **options
        )
        widths = self.student.num_features, data.features.shape[1]
        self.lessons = OBJECTIVES[objective](widths) if objective else []
        heads = {lesson.name: lesson.head for lesson in self.lessons if lesson.head is not None}
        pooled = max((lesson.student.pooled for lesson in self.lessons), default="")
        self.trained = Trainable(self.student, heads, Taps(logits=True, pooled=pooled))
        self._data, self.images = data, len(data.labels)
        self.teacher_error = 1 - float(data.teacher_validation)

    def losses(self, index: Tensor) -> dict[str, Tensor]:
        """See `Pupil`."""
        data = self._data
        outputs, projected = self.trained(data.images[index])
        outputs = in_float32(outputs)
        labels = data.labels[index]
        assert outputs.logits is not None
        losses = {"task": nn.functional.cross_entropy(outputs.logits, labels)}
        taught = Outputs(logits=data.logits[index], pooled=data.features[index])
        for lesson in self.lessons:
            losses[lesson.name] = lesson.loss(outputs, projected.get(lesson.name), taught, labels)
        return losses

    def held_out_loss(self, generator: Generator) -> Tensor:
        """See `Pupil`."""
        return nn.functional.cross_entropy(*self._held_out(generator))

    @torch.no_grad()
    def error(self, generator: Generator) -> Tensor:
        """See `Pupil`."""
        logits, labels = self._held_out(generator)
        return (logits.argmax(1) != labels).double().mean()

    def _held_out(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """The student's logits of a batch, normalised by it as in training, and labels."""
        index = torch.randint(len(self._data.validation_labels), (BATCH,), generator=generator)
        with frozen_statistics(self.trained):
            outputs, _ = self.trained(self._data.validation_images[index])
        assert outputs.logits is not None
        return outputs.logits, self._data.validation_labels[index]

    def score(self, part: str) -> float:
        """Accuracy."""
        return accuracy(self.student, getattr(self._data, part))
