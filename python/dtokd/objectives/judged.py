"""Teachers as models that are judged beside the student: of the same classes, on the student's images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.utils import unwrap_model
from torch import nn

from .taps import Taps
from .teacher import Teacher, names_of


class _AsModel(nn.Module):
    """A call, for what evaluates models."""

    def __init__(self, call: Callable[[Any], Any]) -> None:
        super().__init__()
        self._call = call

    def forward(self, images: Any) -> Any:
        return self._call(images)


def judged(teacher: Teacher, student: Any, names: Sequence[str] | None = None) -> nn.Module | None:
    """From the student's images to the teacher's logits or detections.

    Args:
        teacher: of a task.
        student: a classifier or a detector.
        names: of the student's classes, in their order, where they are known.

    Returns:
        A model for `train.engine.evaluate`; None if the teacher does not predict the student's classes.
    """
    detects = hasattr(student, "observe")
    count = "classes" if detects else "num_classes"
    model: nn.Module = teacher.model
    own, theirs = getattr(student, count, None), getattr(unwrap_model(model), count, None)
    if not own or own != theirs or detects != hasattr(model, "observe"):
        return None
    if not detects:
        theirs_named = names_of(model)
        if theirs_named is not None and names is not None and theirs_named != list(names):
            return None
        return _AsModel(lambda images: teacher(images, Taps(logits=True)).logits)
    called = getattr(model, "class_names", None)  # of transformers' detectors, by number
    if called is None or names is None:
        return model
    # those that were trained here have no names of their own
    known = [name.lower() for name in names], [f"label_{label}" for label in range(len(names))]
    return model if [str(called[key]).lower() for key in sorted(called)] in known else None
