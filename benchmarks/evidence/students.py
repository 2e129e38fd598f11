"""One student: its training, and what is kept of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from dtokd.objectives.base import Objective
from dtokd.objectives.taps import Outputs, Taps, in_float32
from dtokd.objectives.task import Trainable
from dtokd.train.heldout import frozen_statistics
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from dtokd_kernels import Balance, measure_held_out

from ..digits import BATCH, MAX_NORM, ROLES, WEIGHT_DECAY, accuracy, seeded
from .data import DataSet
from .methods import OBJECTIVES, Method


@dataclass(frozen=True)
class Result:
    """What one run left behind. Rates and means are over its iterations; NaN where a method takes no Gram matrix.

    Attributes:
        validation, test: accuracy of the student at the end, in percent.
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


#: timm models of the students that are not ResNets of 40 thousand parameters, by the setting's name.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smaller student": ("test_resnet", {"block": BasicBlock, "channels": (4, 8, 16, 16), "stem_width": 4}),
    "larger student": ("test_resnet", {"block": BasicBlock, "channels": (16, 32, 64, 64), "stem_width": 8}),
    "another student": ("test_efficientnet", {}),
}
RESNET = ("test_resnet", ROLES["student"])


def train(
    data: DataSet, objective: str | None, method: Method, *, lr: float, seed: int, iterations: int, model: str = ""
) -> Result:
    """Train a new student.

    Args:
        data: what to train on.
        objective: the kind of distillation loss, of `OBJECTIVES`; None: there is no teacher.
        method: how the losses are combined.
        lr: the largest learning rate of the schedule.
        seed: of the student's parameters, of the order of the images and of what the method draws.
        iterations: how many batches of 64.
        model: of `MODELS`; "" for the ResNet.
    """
    name, options = MODELS.get(model, RESNET)
    with seeded(seed):
        student: Any = timm.create_model(
            name, in_chans=data.images.shape[1], num_classes=data.logits.shape[1], **options
        )
        # its projector is drawn from the seed too
        widths = student.num_features, data.features.shape[1]
        lessons = [] if objective is None else OBJECTIVES[objective](widths)
    heads = {lesson.name: lesson.head for lesson in lessons if lesson.head is not None}
    pooled = max((lesson.student.pooled for lesson in lessons), default="")
    trained = Trainable(student, heads, Taps(logits=True, pooled=pooled))
    options = method.own(len(lessons))
    optimizer = method.optimizer(trained.parameters(), lr=lr, weight_decay=WEIGHT_DECAY, max_norm=MAX_NORM, **options)
    schedule = OneCycleLR(optimizer, lr, total_steps=iterations, cycle_momentum=False)
    balances: list[Balance] = []
    history: list[Tensor] = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for index in _batches(len(data.labels), iterations, seed):
            losses = _losses(trained, data, lessons, index)
            if method.held_out and len(balances) % method.held_out == 0:
                measure_held_out(optimizer, losses, _held_out(trained, data, seed, len(balances)))
            if method.compared and len(balances) % method.compared == 0:
                error = _error(trained, data, seed, len(balances))
                optimizer.weighting.observe(student=error, teacher=1 - data.teacher_validation)
            optimizer.backward(method.combine(losses))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            assert optimizer.balance is not None
            balances.append(optimizer.balance)
            history.append(torch.stack(list(losses.values())).detach())
    return Result(
        validation=100 * accuracy(student, data.validation),
        test=100 * accuracy(student, data.test),
        skipped=sum(int(b.skipped) for b in balances),
        **_figures(balances, torch.stack(history).double()),
    )


def _batches(images: int, count: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randint(images, (BATCH,), generator=generator)


def _losses(model: Trainable, data: DataSet, lessons: Sequence[Objective], index: Tensor) -> dict[str, Tensor]:
    outputs, projected = model(data.images[index])
    outputs = in_float32(outputs)
    labels = data.labels[index]
    assert outputs.logits is not None
    losses = {"task": nn.functional.cross_entropy(outputs.logits, labels)}
    taught = Outputs(logits=data.logits[index], pooled=data.features[index])
    for lesson in lessons:
        losses[lesson.name] = lesson.loss(outputs, projected.get(lesson.name), taught, labels)
    return losses


def _held_out(model: Trainable, data: DataSet, seed: int, step: int) -> Tensor:
    """The task's loss on a batch of the validation images, which also choose learning rates and fixed weights."""
    logits, labels = _validation_batch(model, data, seed, step)
    return nn.functional.cross_entropy(logits, labels)


@torch.no_grad()
def _error(model: Trainable, data: DataSet, seed: int, step: int) -> Tensor:
    """The student's error rate on such a batch."""
    logits, labels = _validation_batch(model, data, seed, step)
    return (logits.argmax(1) != labels).double().mean()


def _validation_batch(model: Trainable, data: DataSet, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The student's logits, normalised by the batch as in training, and labels."""
    generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + step)
    index = torch.randint(len(data.validation_labels), (BATCH,), generator=generator)
    with frozen_statistics(model):
        outputs, _ = model(data.validation_images[index])
    assert outputs.logits is not None
    return outputs.logits, data.validation_labels[index]


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
