"""What benchmarks train in memory: distorted digits (MNIST-5k), a small teacher, and a smaller student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from dtokd.demo.data import STUDENT_IMAGES, TEACHER_IMAGES, distort, mnist_5k
from dtokd.objectives.features import Pooled
from dtokd.objectives.logits import Hinton
from dtokd.objectives.task import DistillationTask
from dtokd.objectives.teacher import Normalisation, Teacher
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

LEARNING_RATE, WEIGHT_DECAY, MAX_NORM, BATCH = 9e-3, 0.05, 1.0, 64
TEACHER_COPIES, STUDENT_COPIES = 8, 24
#: What differs from timm's `test_resnet`: the teacher has 373 thousand parameters, the student 40 thousand. Tiny vision
#: transformers learn nothing in a few hundred iterations.
ROLES: dict[str, dict[str, Any]] = {
    "teacher": {},
    "student": {"block": BasicBlock, "channels": (8, 16, 32, 32), "stem_width": 4},
}


@dataclass(frozen=True)
class Images:
    """Images [N, 1, 28, 28] float32, normalized to [-1, 1], and their labels [N] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` random batches of different images, the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            index = torch.randperm(len(self), generator=generator)[:BATCH]
            yield self.images[index], self.labels[index]


@dataclass(frozen=True)
class Digits:
    """What there is to train and to test on; the test digits are in none of the others."""

    teacher: Images
    student: Images
    test: Images


def load_digits(seed: int) -> Digits:
    """3000 digits for the teacher, 500 of these for the students, each distorted several times; 2000 to test."""
    images, labels = mnist_5k()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)

    def distorted(index: Tensor, copies: int) -> Images:
        index = index.repeat(copies)
        return Images(distort(images[index], generator) * 2 - 1, labels[index])

    return Digits(
        teacher=distorted(order[:TEACHER_IMAGES], TEACHER_COPIES),
        student=distorted(order[:STUDENT_IMAGES], STUDENT_COPIES),
        test=distorted(order[TEACHER_IMAGES:], 1),
    )


def make_model(role: str) -> ResNet:
    """A new network, the "teacher" or the "student"."""
    return cast(ResNet, timm.create_model("test_resnet", in_chans=1, num_classes=10, **ROLES[role]))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial parameters from this seed; torch's random state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def new_student(objective: str, teacher: nn.Module, seed: int) -> tuple[ResNet, DistillationTask]:
    """A student, and the task that computes its losses "task" and "distill"; the same seed gives the same student.

    Args:
        objective: "logit", Hinton's KL at temperature 4, or "feature", the mean squared distance to the teacher's
            pooled features through a linear projector.
        teacher: trained.
        seed: of student and projector.
    """
    with seeded(seed):
        student = make_model("student")
        lesson = (
            Hinton("distill", 4.0)
            if objective == "logit"
            else Pooled("distill", "linear", (student.num_features, 96), "head", "none", "mse")
        )
    wrapped = Teacher(teacher, "teacher", Normalisation.of(student))
    return student, DistillationTask(student, nn.CrossEntropyLoss(), [(wrapped, [lesson])])


def train_teacher(model: nn.Module, images: Images, *, iterations: int, seed: int) -> None:
    """Train on cross-entropy, then freeze the model in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = one_cycle(optimizer, iterations)
    for inputs, labels in images.batches(iterations, seed):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(inputs), labels))
        optimizer.step()
        schedule.step()
    model.eval().requires_grad_(False)


def one_cycle(optimizer: Optimizer, iterations: int) -> OneCycleLR:
    """The learning rate: up for the first 30 % of the iterations, then down to almost nothing."""
    return OneCycleLR(optimizer, LEARNING_RATE, total_steps=iterations, cycle_momentum=False)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of the images that the model names right. Leaves it in evaluation mode."""
    model.eval()
    return float((model(images.images).argmax(1) == images.labels).double().mean())
