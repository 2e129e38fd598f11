"""What every objective has: a name, what it reads of student and teacher, perhaps a trainable head, and a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .taps import Outputs, Taps

#: Float32 cannot tell a loss of this size, made of terms around 1, from one at its infimum 0.
SMALLEST = 1e-7


def at_bound(loss: Tensor) -> Tensor:
    """A loss within `SMALLEST` of 0 as a constant, which without a gradient drops out of the step: 0 has no logarithm.

    One that is further below is really negative and stays, for the balance to refuse.
    """
    return torch.where(loss.abs() < SMALLEST, SMALLEST, loss)


class Objective:
    """One loss of one teacher.

    Attributes:
        name: in logs and as the balanced loss's name.
        head: trainable module on the student's outputs (a projector), or None. Only this objective reaches it: its
            parameters are private.
        memory: what it remembers of earlier batches, in buffers, or None. Saved with the heads; the same on all ranks.
        student, teacher: what is read of each. A teacher whose logits no objective reads may have any classes, or none.
    """

    name: str
    head: nn.Module | None = None
    memory: nn.Module | None = None
    student: Taps = Taps()
    teacher: Taps = Taps()

    def loss(self, student: Outputs, projected: object, teacher: Outputs, target: Any) -> Tensor:
        """The loss, a scalar, float32, with infimum 0; a value that rounding may take below 0 is brought to 0 here.

        Args:
            student: its outputs.
            projected: what `head` made of them; None without a head.
            teacher: its outputs, detached.
            target: labels [B], or class probabilities [B, classes]; of detectors what they learn from.
        """
        raise NotImplementedError

    def observe(self, teacher: Outputs) -> None:
        """Add the teacher's outputs for a batch to the statistics that are fixed before training, if there are any."""

    def settle(self) -> None:
        """Fix these statistics. All ranks call it."""

    def remember(self, teacher: Outputs) -> None:
        """Take the teacher's outputs for a batch of training into `memory`, before `loss`. All ranks call it."""
