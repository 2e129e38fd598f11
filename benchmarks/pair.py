"""A student and its teacher whose iterations are timed: untrained models of timm, as speed does not depend on it."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import MODELS

TEMPERATURE = 4.0


class Pair:
    """A student that learns logits, and one batch of random images.

    Args:
        student, teacher: models of timm, or their short names.
        batch: images per iteration.
        size: their height and width in pixels.
    """

    def __init__(self, student: str, teacher: str, batch: int, size: int) -> None:
        torch.manual_seed(0)
        self.student = timm.create_model(MODELS.get(student, student))
        self._teacher = timm.create_model(MODELS.get(teacher, teacher)).eval()
        self._images = torch.rand(batch, 3, size, size)
        self._labels = torch.arange(batch)

    @torch.no_grad()
    def teach(self) -> Tensor:
        """The teacher's forward pass: softened predictions [batch, classes]."""
        return F.softmax(self._teacher(self._images) / TEMPERATURE, 1)

    def losses(self, target: Tensor) -> dict[str, Tensor]:
        """The student's forward pass: "task" and "distill"."""
        logits = self.student(self._images)
        distill = F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), target, reduction="batchmean")
        return {"task": F.cross_entropy(logits, self._labels), "distill": distill}
