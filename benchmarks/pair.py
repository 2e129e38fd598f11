"""A student and its teacher whose iterations are timed: untrained models of timm, as speed does not depend on it."""

from __future__ import annotations

from functools import partial

import timm
import torch
import torch._functorch.config
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
        device: where they are.
        mode: "eager"; "compiled": the student by torch.compile; "bf16": forward passes in bfloat16, by autocast.
    """

    def __init__(
        self, student: str, teacher: str, batch: int, size: int, device: str = "cpu", mode: str = "eager"
    ) -> None:
        torch.manual_seed(0)
        self.student = timm.create_model(MODELS.get(student, student)).to(device)
        self._teacher = timm.create_model(MODELS.get(teacher, teacher)).eval().to(device)
        self._images = torch.rand(batch, 3, size, size).to(device)
        self._labels = torch.arange(batch, device=device)
        self._cast = partial(torch.autocast, device, torch.bfloat16, enabled=mode == "bf16")
        self._forward = self.student
        if mode == "compiled":
            torch._functorch.config.donated_buffer = False  # several passes read what one leaves
            self._forward = torch.compile(self.student)

    @torch.no_grad()
    def teach(self) -> Tensor:
        """The teacher's forward pass: softened predictions [batch, classes]."""
        with self._cast():
            return F.softmax(self._teacher(self._images).float() / TEMPERATURE, 1)

    def losses(self, target: Tensor) -> dict[str, Tensor]:
        """The student's forward pass: "task" and "distill"."""
        with self._cast():
            logits = self._forward(self._images).float()
        distill = F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), target, reduction="batchmean")
        return {"task": F.cross_entropy(logits, self._labels), "distill": distill}
