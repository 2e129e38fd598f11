"""What is compared: ways to combine the losses, on several kinds of distillation loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtokd.objectives.base import Objective
from dtokd.objectives.features import Pooled
from dtokd.objectives.logits import Hinton
from torch import Tensor

from dtokd_kernels import DTOAdamW
from dtokd_kernels.sources import Ema
from dtokd_kernels.weighting import (
    DTO,
    DWA,
    IMTLG,
    RLW,
    AlignedMTL,
    Amortized,
    Auto,
    CAGrad,
    ConFIG,
    DualProj,
    Fixed,
    HeldOut,
    LogSum,
    NashMTL,
    PCGrad,
    Reachable,
    Share,
    TaskFirst,
    UncertaintyWeighting,
    UPGrad,
    WhileBetter,
)

from .trials import AdamMetric, OwnMomentum

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """One way to train a student.

    Attributes:
        title: in tables.
        options: of the optimizer.
        optimizer: its class.
        combine: what becomes of the losses before the optimizer sees them.
        only: the kinds of loss it is for; empty for all.
        held_out: steps from one look at a batch of the validation images to the next; 0 for none.
        compared: steps from one comparison of student and teacher, on a batch of the validation images, to the next.
        fixed: the weight of distillation, shared equally by its losses, where it is one of the fixed weights among
            which validation chooses; None where the weighting decides.
    """

    title: str
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., Any] = DTOAdamW
    combine: Callable[[Losses], Losses] = dict
    only: Sequence[str] = ()
    held_out: int = 0
    compared: int = 0
    fixed: float | None = None

    def own(self, distillations: int) -> dict[str, Any]:
        """The options for one run with so many distillation losses; rules and sources have memories of their own."""
        options = copy.deepcopy(self.options)
        if self.fixed is not None:
            options["weighting"] = Fixed([1 - self.fixed, *[self.fixed / distillations] * distillations])
        return options


def _fixed(weight: float) -> Method:
    """A weighted sum of the losses, as one tunes it by hand; `weight` is that of distillation."""
    # without the task's loss the classifier of a student with a feature loss learns nothing
    only = () if weight < 1 else LOGITS
    # "balanced": a sum weighs the gradients of heads and projectors too
    return Method(f"fixed {weight:g}", {"private": "balanced"}, only=only, fixed=weight)


def _sum(losses: Losses) -> Losses:
    distillation = [loss for name, loss in losses.items() if name != "task"]
    return {"sum": 0.5 * losses["task"] + 0.5 * sum(distillation) / len(distillation)}


def _logits(name: str, temperature: float) -> Objective:
    return Hinton(name, temperature)


def _features(name: str, widths: tuple[int, int]) -> Objective:
    return Pooled(name, "linear", widths, "head", "layernorm", "mse")


#: Kinds of distillation, and the objectives for pooled features of these widths, the student's and the teacher's.
OBJECTIVES: dict[str, Callable[[tuple[int, int]], list[Objective]]] = {
    "logits, T = 4": lambda widths: [_logits("distill", 4.0)],
    "logits, T = 1": lambda widths: [_logits("distill", 1.0)],
    "features": lambda widths: [_features("distill", widths)],
    "logits and features": lambda widths: [_logits("logits", 4.0), _features("features", widths)],
}
LOGITS = tuple(OBJECTIVES)[:2]
_ONE_LOSS = tuple(OBJECTIVES)[:3]
#: What is trained: the kinds of distillation on each data set.
SETTINGS: dict[str, tuple[str, ...]] = {
    "digits": _ONE_LOSS,
    "animals": tuple(OBJECTIVES),
    "photos": tuple(OBJECTIVES),
    "digits, wrong teacher": ("logits, T = 4",),
    "animals, random teacher": ("logits, T = 4",),
    "animals, weak teacher": ("logits, T = 4",),
    "digits, few images": ("logits, T = 4",),
    # added when the rules and their options were fixed: nothing was chosen on these three
    "animals, few images": ("features",),
    "digits, weak teacher": ("logits, T = 4",),
    "photos, wrong teacher": ("logits, T = 1",),
    "digits, long": ("features",),
    "photos, long": ("logits, T = 4",),
    "digits, smaller student": ("features",),
    "animals, larger student": ("logits, T = 4",),
    "photos, another student": ("logits, T = 4",),
    "scenes": ("features and predictions",),
}
#: Whose teachers know less than a student that learns alone.
BAD_TEACHERS = (
    *("digits, wrong teacher", "animals, random teacher", "animals, weak teacher"),
    *("digits, weak teacher", "photos, wrong teacher"),
)
#: Batches that a student is trained with.
ITERATIONS, LONG, SCENES = 200, 2000, 400
#: The student without a teacher.
NONE = Method("none", combine=lambda losses: {"task": losses["task"]}, options={"weighting": Fixed()})
#: Everything else. One loss under a logarithm, or equal weights on log-gradients, have the factor 1 / L of DTO's
#: steps without its weights.
METHODS = (
    *(_fixed(weight) for weight in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)),
    Method("log of the sum", {"weighting": LogSum()}, combine=_sum),
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
    Method("auto", {"weighting": Auto("task", window=20)}, held_out=5),
    Method("while better", {"weighting": WhileBetter("task")}, compared=5),
    Method("share, half", {"weighting": Share()}),
    Method("DTO, reachable", {"weighting": Reachable()}),
    Method("task first, cosine", {"weighting": TaskFirst("task")}),
    Method("MGDA", {"weighting": DTO(log_gradients=False)}),
    Method("CAGrad", {"weighting": CAGrad()}),
    Method("UPGrad", {"weighting": UPGrad()}),
    Method("DualProj", {"weighting": DualProj()}),
    Method("Aligned-MTL", {"weighting": AlignedMTL()}),
    Method("ConFIG", {"weighting": ConFIG()}),
    Method("Nash-MTL", {"weighting": NashMTL()}),
    Method("IMTL-G", {"weighting": IMTLG()}),
    Method("random weights", {"weighting": RLW()}),
    Method("DWA", {"weighting": DWA(period=10)}),
    Method("uncertainty", {"weighting": UncertaintyWeighting()}),
    Method("DTO, AdamW's metric", optimizer=AdamMetric),
    Method("own momentum, 0.075", {"delta": 0.075}, OwnMomentum),
)


def iterations_of(data: str) -> int:
    """How many batches a student is trained with."""
    return SCENES if data == "scenes" else LONG if data.endswith(", long") else ITERATIONS


def methods_of(objective: str) -> list[Method]:
    """The methods that are compared on one kind of loss."""
    return [method for method in METHODS if not method.only or objective in method.only]
