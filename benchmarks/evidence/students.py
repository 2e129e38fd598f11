"""One student: its training, and what is kept of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from dtokd_kernels import Balance, measure_held_out

from ..digits import MAX_NORM, WEIGHT_DECAY, seeded
from .classifiers import Classifying
from .data import DataSet
from .methods import Method
from .scenes import Detecting, SceneSet


@dataclass(frozen=True)
class Result:
    """What one run left behind. Rates and means are over its iterations; NaN where a method takes no Gram matrix.

    Attributes:
        validation, test: accuracy of the student at the end, in percent; a detector's AP50.
        task_loss, distill_loss: means over the last tenth of the run; of two distillation losses, their sum.
        weight: mean weight of distillation, all its losses together, among the balanced objectives.
        vertex: share of steps, in percent, in which one weight was exactly 0.
        conflict: share of steps, in percent, in which the gradients pointed apart.
        dominance: median of |g distill| / |g task|.
        cosine: mean cosine between the gradients.
        skipped: steps that were skipped.
    """

    validation: float
    test: float
    task_loss: float
    distill_loss: float
    weight: float
    vertex: float
    conflict: float
    dominance: float
    cosine: float
    skipped: int


def train(
    data: DataSet | SceneSet, objective: str, method: Method, *, lr: float, seed: int, iterations: int, model: str = ""
) -> Result:
    """Train a new student.

    Args:
        data: what to train on.
        objective: the kind of distillation loss, of `OBJECTIVES`; "": there is no teacher.
        method: how the losses are combined.
        lr: the largest learning rate of the schedule.
        seed: of the student's parameters, of the order of the images and of what the method draws.
        iterations: how many batches.
        model: of `classifiers.MODELS`; "" for the ResNet.
    """
    with seeded(seed):
        student = Detecting(data, objective) if isinstance(data, SceneSet) else Classifying(data, objective, model)
    trained, options = student.trained, method.own(len(student.lessons))
    optimizer = method.optimizer(trained.parameters(), lr=lr, weight_decay=WEIGHT_DECAY, max_norm=MAX_NORM, **options)
    schedule = OneCycleLR(optimizer, lr, total_steps=iterations, cycle_momentum=False)
    balances: list[Balance] = []
    history: list[Tensor] = []
    batches = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for step in range(iterations):
            losses = student.losses(torch.randint(student.images, (student.batch,), generator=batches))
            looks = torch.Generator().manual_seed((seed + 1) * 1_000_003 + step)
            if method.held_out and step % method.held_out == 0:
                measure_held_out(optimizer, losses, student.held_out_loss(looks))
            if method.compared and step % method.compared == 0:
                optimizer.weighting.observe(student=student.error(looks), teacher=student.teacher_error)
            optimizer.backward(method.combine(losses))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            assert optimizer.balance is not None
            balances.append(optimizer.balance)
            history.append(torch.stack(list(losses.values())).detach())
    return Result(
        validation=100 * student.score("validation"),
        test=100 * student.score("test"),
        skipped=sum(int(b.skipped) for b in balances),
        **_figures(balances, torch.stack(history).double()),
    )


def _figures(balances: list[Balance], losses: Tensor) -> dict[str, float]:
    last = losses[-max(1, len(losses) // 10) :].mean(0)
    figures = {"task_loss": float(last[0]), "distill_loss": float("nan")}
    figures |= dict.fromkeys(("weight", "vertex", "conflict", "dominance", "cosine"), float("nan"))
    if losses.shape[1] > 1:
        figures["distill_loss"] = float(last[1:].sum())
    if balances[0].weights.numel() > 1:
        figures["weight"] = _mean([b.weights[1:].sum() for b in balances])
        cosine = torch.stack([b.cosine[0, 1] for b in balances]).double()
        if bool(cosine.isfinite().all()):  # one pass tells nothing of the Gram matrix
            figures["cosine"] = float(cosine.mean())
            figures["vertex"] = 100 * _mean([b.vertex for b in balances])
            figures["conflict"] = 100 * _mean([b.conflict for b in balances])
            figures["dominance"] = float(torch.stack([b.dominance for b in balances]).median())
    return figures


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).double().mean())
