"""What is compared: ways to combine the two losses, on three kinds of distillation loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtokd.objectives.base import Objective
from dtokd.objectives.features import Pooled
from dtokd.objectives.logits import Hinton
from torch import Tensor

from dtokd_kernels.sources import Ema
from dtokd_kernels.weighting import DTO, Amortized, Fixed, HeldOut, LogSum, PCGrad, Reachable, Share, TaskFirst

Losses = dict[str, Tensor]

#: The student's and the teacher's pooled features have these widths; the second is the data set's.
STUDENT_WIDTH = 32


@dataclass(frozen=True)
class Method:
    """One way to train a student.

    Attributes:
        title: in tables.
        options: of the optimizer.
        combine: what becomes of the losses before the optimizer sees them.
        only: the kinds of loss it is for; empty for all.
        held_out: steps from one look at a batch of the validation images to the next; 0 for none.
    """

    title: str
    options: dict[str, Any] = field(default_factory=dict)
    combine: Callable[[Losses], Losses] = dict
    only: Sequence[str] = ()
    held_out: int = 0

    @property
    def grid(self) -> bool:
        """Whether it is one of the fixed weights among which validation chooses."""
        return self.title.startswith("fixed")


def _fixed(weight: float) -> Method:
    """A weighted sum of the losses, as one tunes it by hand; `weight` is that of distillation."""
    # "balanced": a sum weighs the gradients of heads and projectors too
    options = {"weighting": Fixed([1 - weight, weight]), "private": "balanced"}
    # without the task's loss the classifier of a student with a feature loss learns nothing
    return Method(f"fixed {weight:g}", options, only=() if weight < 1 else LOGITS)


def _sum(losses: Losses) -> Losses:
    return {"sum": 0.5 * losses["task"] + 0.5 * losses["distill"]}


#: Kinds of the distillation loss, and the objective with the teacher's width.
OBJECTIVES: dict[str, Callable[[int], Objective]] = {
    "logits, T = 4": lambda width: Hinton("distill", 4.0),
    "logits, T = 1": lambda width: Hinton("distill", 1.0),
    "features": lambda width: Pooled("distill", "linear", (STUDENT_WIDTH, width), "head", "layernorm", "mse"),
}
LOGITS = tuple(OBJECTIVES)[:2]
#: The student without a teacher.
NONE = Method("none", combine=lambda losses: {"task": losses["task"]}, options={"weighting": Fixed()})
#: Everything else. One loss under a logarithm, or equal weights on log-gradients, have the factor 1 / L of DTO's
#: steps without its weights.
METHODS = (
    *(_fixed(weight) for weight in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)),
    Method("log of the sum", {"weighting": LogSum()}, _sum),
    Method("sum of logs", {"weighting": LogSum()}),
    Method("DTO", {"weighting": DTO()}),
    Method("DTO, rescaled", {"weighting": DTO(), "rescale": "sum"}),
    Method("DTO, affine", {"weighting": DTO(clamp=False)}),
    Method("DTO, private balanced", {"weighting": DTO(), "private": "balanced"}, only=("features",)),
    Method("DTO, Gram averaged", {"weighting": DTO(), "gram": Ema(0.9)}),
    Method("DTO, amortized (Eq. 18)", {"weighting": Amortized("eq18")}),
    Method("DTO, amortized (FAMO)", {"weighting": Amortized()}),
    Method("FAMO", {"weighting": Amortized(), "rescale": "sum"}),
    Method("PCGrad", {"weighting": PCGrad()}),
    Method("held-out gain", {"weighting": HeldOut("task")}, held_out=5),
    Method("share, half", {"weighting": Share()}),
    Method("DTO, reachable", {"weighting": Reachable()}),
    Method("task first, cosine", {"weighting": TaskFirst("task")}),
)


def methods_of(objective: str) -> list[Method]:
    """The methods that are compared on one kind of loss."""
    return [method for method in METHODS if not method.only or objective in method.only]
