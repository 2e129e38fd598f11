"""What the training of a student asks of it, whatever it learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from dtokd.objectives.base import Objective
from torch import Generator, Tensor, nn


class Pupil(ABC):
    """A new student with its data.

    Attributes:
        trained: all that is trained.
        lessons: the distillation losses; none without a teacher.
        images: that it learns from.
        batch: how many at once.
        teacher_error: the teacher's on the validation images, 0 at best.
    """

    trained: nn.Module
    lessons: Sequence[Objective]
    images: int
    batch: int
    teacher_error: float

    @abstractmethod
    def losses(self, index: Tensor) -> dict[str, Tensor]:
        """The task's loss as "task", and the distillation losses, on these of the images."""

    @abstractmethod
    def held_out_loss(self, generator: Generator) -> Tensor:
        """The task's loss on validation images, which also choose learning rates and fixed weights."""

    @abstractmethod
    def error(self, generator: Generator) -> Tensor:
        """The student's error on such images, [] float64."""

    @abstractmethod
    def score(self, part: str) -> float:
        """What tables show, in [0, 1], on the "validation" or the "test" images."""
