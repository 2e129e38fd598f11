"""A timm `TrainingTask` for detectors: the detector's own loss, and objectives of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..objectives.base import at_bound
from ..objectives.taps import Taps
from ..objectives.task import StudentTask, Trainable
from .batch import Images, Outputs, Target
from .detectors.base import Detector
from .matching import match_queries
from .objectives import Objective, as_odds


class TrainableDetector(Trainable):
    """Student and heads in one forward pass."""

    def __init__(self, student: Detector, heads: dict[str, nn.Module]) -> None:
        super().__init__(student, heads, Taps())

    def forward(  # type: ignore[override]
        self, images: Images, targets: list[Target]
    ) -> tuple[Tensor, Outputs, dict[str, Any]]:
        """Task loss, outputs, and what each head makes of them."""
        loss, outputs = self.student.losses(images, targets)  # type: ignore[operator]
        return loss, outputs, {name: head(outputs) for name, head in self.heads.items()}


class DetectionTask(StudentTask):
    """Task loss and objectives, each on its own and as a weighted sum; as `objectives.task.DistillationTask`.

    Args:
        student: trains.
        evaluator: makes what judges it.
        teacher: frozen, in evaluation mode; None for the task alone.
        objectives: between the two.
        columns: [classes] which of the teacher's classes are the student's; None if it has others.
        matched: queries are paired by `match_queries`, else by index.
        task_weight, weights: in the sum.
        device, dtype: of the task.
    """

    def __init__(
        self,
        student: Detector,
        evaluator: Callable[[], Any],
        teacher: Detector | None = None,
        objectives: Sequence[Objective] = (),
        *,
        columns: Tensor | None = None,
        matched: bool = True,
        task_weight: float = 1.0,
        weights: dict[str, float] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=False)
        heads = {o.name: o.head.to(self.device) for o in objectives if o.head is not None}
        self.trainable_module: Any = TrainableDetector(student, heads)
        self._evaluator, self._columns, self._matched = evaluator, columns, matched
        # a list, so that the teacher is no part of the module: not trained, not saved
        self.teacher = [] if teacher is None else [teacher.to(self.device)]
        self.objectives = list(objectives)
        self.task_loss_weight = task_weight
        self.distill_loss_weights = dict(weights or {o.name: 1.0 for o in objectives})

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> DetectionTask:
        super()._apply(fn, *args, **kwargs)
        for teacher in self.teacher:
            teacher.to(self.device)
        return self

    def create_evaluator(self) -> Any:
        """For `train.engine.evaluate`."""
        return self._evaluator()

    def forward(self, input: Images, target: list[Target]) -> dict[str, Any]:
        """The losses of a batch: "loss", the weighted sum, "output", and "objectives" by name."""
        loss, outputs, projected = self.trainable_module(input, target)
        losses = {"task": loss.float()}
        total = self.task_loss_weight * losses["task"]
        for teacher in self.teacher:
            with torch.no_grad():
                taught = teacher.observe(input).detach()
            pairs = self._pairs(outputs, taught, teacher) if self._matched else None
            if not teacher.sigmoid:
                taught = taught._replace(logits=as_odds(teacher.probabilities(taught)))
            for o in self.objectives:
                value = o.loss(outputs, projected.get(o.name), taught, pairs)
                total = total + self.distill_loss_weights[o.name] * value
                losses[o.name] = value
        return {
            "loss": total,
            "output": outputs.logits,
            "objectives": {name: at_bound(value) for name, value in losses.items()},
        }

    def _pairs(self, outputs: Outputs, taught: Outputs, teacher: Detector) -> tuple[Tensor, Tensor]:
        student: Any = self.get_eval_model()
        own = theirs = None
        if self._columns is not None:
            own = student.probabilities(outputs)
            theirs = teacher.probabilities(taught)[..., self._columns.to(own.device)]
        return match_queries((outputs.boxes, own), (taught.boxes, theirs))
