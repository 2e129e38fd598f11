"""The training loops of the demo: a plain one for the teacher, a balanced one for the students.

Every student takes the same loop, optimizer, schedule, batches and initial parameters; only what turns the Gram
matrix into weights differs, and which implementation does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from dtokd_kernels import Balance, DTOAdamW
from dtokd_kernels.types import Weighting

from .data import Images
from .objectives import split_losses

LEARNING_RATE, WEIGHT_DECAY, MAX_NORM, BATCH = 9e-3, 0.05, 1.0, 64


@dataclass(frozen=True)
class Method:
    """How a student's losses are combined.

    Attributes:
        title: what the reports call it.
        weighting: how the Gram matrix becomes weights.
        backend: who computes the step; None: the best there is.
    """

    title: str
    weighting: Weighting
    backend: str | None = None


@dataclass(frozen=True)
class History:
    """What one student's training left behind.

    Attributes:
        curves: column -> [iterations] numbers; a student with one loss has no columns about the second.
        step_ms: median time of the balanced step: Gram matrix, weights and the parameters' update.
        iteration_ms: median time of a whole iteration, without fetching the batch.
    """

    curves: dict[str, Tensor]
    step_ms: float
    iteration_ms: float


def train_teacher(model: nn.Module, images: Images, *, iterations: int, seed: int, advance: Callable[[], None]) -> None:
    """Train on cross-entropy, then freeze the model in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = one_cycle(optimizer, iterations)
    for inputs, labels in images.batches(BATCH, iterations, seed):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(inputs), labels))
        optimizer.step()
        schedule.step()
        advance()
    model.eval().requires_grad_(False)


def train_student(
    task: TrainingTask, images: Images, method: Method, *, iterations: int, seed: int, advance: Callable[[], None]
) -> History:
    """Train the student inside `task`.

    Args:
        task: computes the losses; its teacher is frozen.
        images: what to train on.
        method: how to combine the losses.
        iterations: how many batches to take.
        seed: of the batches.
        advance: called after each iteration.
    """
    optimizer = balanced_adamw(task, method)
    schedule = one_cycle(optimizer, iterations)
    balances: list[Balance] = []
    losses: list[Tensor] = []
    steps, rounds = [], []
    for inputs, labels in images.batches(BATCH, iterations, seed):
        start = perf_counter()
        values = split_losses(task(inputs, labels))
        optimizer.backward(values)
        step_start = perf_counter()
        optimizer.step()
        steps.append(perf_counter() - step_start)
        optimizer.zero_grad()
        schedule.step()
        rounds.append(perf_counter() - start)
        # kept as tensors until the end: on a GPU reading one would stall it
        assert optimizer.balance is not None
        balances.append(optimizer.balance)
        losses.append(torch.stack(list(values.values())).detach())
        advance()
    return History(_curves(balances, torch.stack(losses)), 1e3 * median(steps), 1e3 * median(rounds))


def balanced_adamw(task: TrainingTask, method: Method) -> DTOAdamW:
    """The optimizer that all students share, over the task's parameters that train."""
    return DTOAdamW(
        [p for p in task.parameters() if p.requires_grad],
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_norm=MAX_NORM,
        weighting=method.weighting,
        gram="exact",  # the curves show conflict and dominance of every method, fixed weights included
        backend=method.backend,
    )


def one_cycle(optimizer: Optimizer, iterations: int) -> OneCycleLR:
    """The learning rate: up for the first 30 % of the iterations, then down to almost nothing."""
    return OneCycleLR(optimizer, LEARNING_RATE, total_steps=iterations, cycle_momentum=False)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of the images that the model names right. Leaves it in evaluation mode."""
    model.eval()
    return float((model(images.images).argmax(1) == images.labels).double().mean())


def _curves(balances: list[Balance], losses: Tensor) -> dict[str, Tensor]:
    weights = torch.stack([b.weights for b in balances])
    columns = {"task_loss": losses[:, 0], "task_weight": weights[:, 0]}
    if weights.shape[1] == 2:
        columns |= {
            "distill_loss": losses[:, 1],
            "distill_weight": weights[:, 1],
            "cosine": torch.stack([b.cosine[0, 1] for b in balances]),
            "conflict": torch.stack([b.conflict for b in balances]),
            "dominance": torch.stack([b.dominance for b in balances]),
            "vertex": torch.stack([b.vertex for b in balances]),
        }
    columns["norm"] = torch.stack([b.norm for b in balances])
    return {name: column.double() for name, column in columns.items()}
