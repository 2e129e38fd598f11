"""The two losses of a student, task and distillation, as timm.task computes them.

Both distillation losses can reach 0, as the logarithm of a loss wants it: a constant added to one (the teacher's
entropy in a soft cross-entropy) would change the weights.
"""

from __future__ import annotations

from collections.abc import Callable

from timm.models.resnet import ResNet
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask, TrainingTask
from torch import Tensor, nn

from .models import make_model, seeded

TEMPERATURE = 4.0


def task_alone(student: nn.Module, teacher: nn.Module) -> TrainingTask:
    """Cross-entropy; the teacher is not used."""
    return ClassificationTask(student, nn.CrossEntropyLoss(), verbose=False)


def logit(student: nn.Module, teacher: nn.Module) -> TrainingTask:
    """Cross-entropy, and the KL divergence from the teacher's softened predictions (Hinton et al., 2015)."""
    return LogitDistillationTask(student, teacher, nn.CrossEntropyLoss(), temperature=TEMPERATURE, verbose=False)


def feature(student: nn.Module, teacher: nn.Module) -> TrainingTask:
    """Cross-entropy, and the mean squared distance to the teacher's pooled features, through a linear projector.

    Only distillation reaches the projector and only the task the classifier: both are private parameters, outside
    the balance.
    """
    return FeatureDistillationTask(student, teacher, nn.CrossEntropyLoss(), verbose=False)


OBJECTIVES: dict[str, Callable[[nn.Module, nn.Module], TrainingTask]] = {
    "none": task_alone,
    "logit": logit,
    "feature": feature,
}


def new_student(objective: str, teacher: nn.Module, seed: int) -> tuple[ResNet, TrainingTask]:
    """A student, and the task that computes its losses. The same seed gives the same student for every objective."""
    with seeded(seed):
        student = make_model("student")
        return student, OBJECTIVES[objective](student, teacher)


def split_losses(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses to balance, from what a timm task returns: "task" and, where there is a teacher, "distill"."""
    if "kd_loss" not in result:
        return {"task": result["loss"]}
    return {"task": result["task_loss"], "distill": result["kd_loss"]}
