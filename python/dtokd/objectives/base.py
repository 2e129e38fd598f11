"""What every objective has: a name, what it reads of student and teacher, perhaps a trainable head, and a loss."""

from __future__ import annotations

from torch import Tensor, nn

from .taps import Outputs, Taps


class Objective:
    """One loss of one teacher.

    Attributes:
        name: in logs and as the balanced loss's name.
        head: trainable module on the student's outputs (a projector), or None. Only this objective reaches it: its
            parameters are private.
        student, teacher: what is read of each.
    """

    name: str
    head: nn.Module | None = None
    student: Taps
    teacher: Taps

    def loss(self, student: Outputs, projected: object, teacher: Outputs, target: Tensor) -> Tensor:
        """The loss, a scalar, float32.

        Args:
            student: its outputs.
            projected: what `head` made of them; None without a head.
            teacher: its outputs, detached.
            target: labels [B], or class probabilities [B, classes].
        """
        raise NotImplementedError
