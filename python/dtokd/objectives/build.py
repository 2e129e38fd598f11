"""timm's tasks, with their losses one by one under "objectives"."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import Tensor, nn

from ..errors import UsageError
from .teacher import load_teacher

#: timm's names of the losses, and ours.
_OBJECTIVES = {"task_loss": "task", "kd_loss": "distill", "distill_loss": "distill"}

#: As the optimizers' `loss_floor`.
_FLOOR = 1e-8


class _WithObjectives:
    """Adds {"objectives": {"task": loss, "distill": loss}}, unweighted, to what timm's task returns."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        result: dict[str, Any] = super().forward(input, target)  # type: ignore[misc]
        parts = {name: result[key] for key, name in _OBJECTIVES.items() if key in result}
        if "distill" in parts:
            # a divergence of equal predictions may round to less than 0, which has no logarithm; here it has no
            # gradient then, so that the objective drops out of the step
            parts["distill"] = parts["distill"].clamp_min(_FLOOR)
        return {**result, "objectives": parts or {"task": result["loss"]}}


class Classification(_WithObjectives, ClassificationTask):
    """No teacher."""


class LogitDistillation(_WithObjectives, LogitDistillationTask):
    """The teacher's softened predictions."""


class FeatureDistillation(_WithObjectives, FeatureDistillationTask):
    """The teacher's pooled features."""


class TokenDistillation(_WithObjectives, TokenDistillationTask):
    """The teacher's predictions, by a token of their own."""


def build(
    options: argparse.Namespace,
    student: nn.Module,
    criterion: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> TrainingTask:
    """The task that the options describe.

    Args:
        options: of `objectives.options`.
        student: a timm model.
        criterion: the labels' loss.
        device, dtype: of the teacher and of the task's buffers.

    Returns:
        A task whose forward(input [B, C, H, W], target) returns "loss", the weighted sum; "output", the student's
        logits [B, classes]; "objectives", the losses by name: task and, with a teacher, distill.

    Raises:
        UsageError: the teacher cannot be loaded, or does not fit the student.
    """
    if options.kd_model_name is None:
        if options.kd_teacher_path is not None:
            raise UsageError("--kd-teacher-path: say with --kd-model-name which model these weights belong to")
        return _in_float32(Classification(student, criterion, device=device, dtype=dtype, verbose=False))
    teacher = load_teacher(options, student, device=device, dtype=dtype)
    shared: dict[str, Any] = {
        "criterion": criterion,
        "task_loss_weight": options.task_loss_weight,
        "distill_loss_weight": options.distill_loss_weight,
        "device": device,
        "dtype": dtype,
        "verbose": False,
    }
    try:
        return _in_float32(_distillation(options, student, teacher, shared))
    except ValueError as error:
        raise UsageError(f"--kd-distill-type {options.kd_distill_type}: {error}") from error


def _distillation(
    options: argparse.Namespace, student: nn.Module, teacher: nn.Module, shared: dict[str, Any]
) -> TrainingTask:
    if options.kd_distill_type == "logit":
        return LogitDistillation(student, teacher, temperature=options.kd_temperature, **shared)
    if options.kd_distill_type == "token":
        return TokenDistillation(
            student,
            teacher,
            distill_type=options.kd_token_distill_type,
            temperature=options.kd_temperature,
            **shared,
        )
    return FeatureDistillation(
        student,
        teacher,
        student_feature_dim=options.kd_student_feature_dim,
        teacher_feature_dim=options.kd_teacher_feature_dim,
        **shared,
    )


def _in_float32(task: TrainingTask) -> TrainingTask:
    """Losses of float32 outputs, whatever autocast makes the models compute in: torch does so by itself on a GPU."""
    for module in (task.trainable_module, getattr(task, "teacher", None)):
        if module is not None:
            module.register_forward_hook(_to_float32)
    return task


def _to_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(part.float() for part in output)
    return output.float()


@torch.no_grad()
def check_sizes(task: TrainingTask, input_size: tuple[int, int, int]) -> None:
    """Try one image of the student's size, so that a teacher for another size is found before training.

    Raises:
        UsageError: the teacher does not take it, or its output does not fit.
    """
    teacher = getattr(task, "teacher", None)
    if teacher is None:
        return
    image = torch.zeros(1, *input_size, device=task.device, dtype=task.dtype)
    try:
        classes = teacher(image).shape[-1]
    except Exception as error:
        own = teacher.model.pretrained_cfg.get("input_size")
        raise UsageError(
            f"--kd-model-name: the teacher does not take the student's images of {input_size} (its own are {own}): "
            f"{error}; choose --img-size, or another teacher"
        ) from error
    student = task.get_eval_model().num_classes
    if classes != student:
        raise UsageError(f"--kd-model-name: the teacher has {classes} classes, the student {student}")
