"""Images that are never trained on, which set the weights (`--kd-balance heldout`, `auto`, `whilebetter`)."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import IterableDataset

import dtokd_kernels as dk
from dtokd_kernels.weighting import Auto, HeldOut, WhileBetter

from ..errors import UsageError
from ..objectives.judged import judged
from ..objectives.task import DistillationTask
from ..values import LOOKING
from .options import HELD_OUT
from .randomness import kept
from .steps import Stepper, losses_of

#: Of the choice of images.
SEED = 20_17


def check(options: argparse.Namespace) -> None:
    """Refuse a rule without held-out images, and held-out images without a rule that looks at them.

    Raises:
        UsageError: names the options.
    """
    share = getattr(options, "kd_held_out", 0.0)
    looks = options.kd_balance in LOOKING
    if looks and not share:
        raise UsageError(
            f"--kd-balance {options.kd_balance}: no images are held out; pass a --kd-held-out above 0, or leave it out "
            f"for {HELD_OUT}"
        )
    if share and not looks:
        raise UsageError(
            f"--kd-held-out: {share:g}, but --kd-balance {options.kd_balance} does not look at held-out images; choose "
            f"{' or '.join(LOOKING)}, or leave it out"
        )
    if share and options.kd_cache_teacher:
        raise UsageError("--kd-held-out: does not go together with --kd-cache-teacher yet; leave one of them out")


def check_window(options: argparse.Namespace, steps: int) -> None:
    """Refuse a rule that would not have chosen its weights when the run ends.

    Args:
        options: of `train.options`.
        steps: of the optimizer, in the whole run.

    Raises:
        UsageError: names the options.
    """
    if options.kd_balance != "auto":
        return
    every, window = options.kd_held_out_every, options.kd_balance_kwargs.get("window", Auto.window)
    if (window - 1) * every < steps:
        return
    most = -(-steps // every)
    fitting = f", or --kd-balance-kwargs window=N with N from 2 to {most}" if most >= 2 else ""
    raise UsageError(
        f"--kd-balance auto: its choice needs {window} measurements, one in {every} steps, but {steps} steps have "
        f"{most}; pass more --epochs, or a smaller --kd-held-out-every{fitting}"
    )


def split(options: argparse.Namespace, images: Any) -> tuple[Any, Any | None]:
    """The training images, and those of them that are held out, chosen at random but the same in each run.

    Args:
        options: of `train.options`.
        images: the training split.

    Raises:
        UsageError: the samples have no number, or too few are held out for a batch of two.
    """
    if not options.kd_held_out:
        return images, None
    if isinstance(images, IterableDataset):
        raise UsageError(f"--kd-held-out: --dataset {options.dataset} is a stream, whose samples have no number")
    trained, held = positions(options.kd_held_out, len(images), labels_of(images))
    return images.part(trained), images.part(held)


def positions(
    share: float, count: int, classes: Sequence[Collection[int]] | None = None
) -> tuple[list[int], list[int]]:
    """Those of `count` images that are trained on, in their order, and those that are held out, in the order of looks.

    Args:
        share: of the images, to be held out.
        count: of the images.
        classes: that each image shows; the last image of a class is trained on. None if they are not known.

    Raises:
        UsageError: fewer than two are held out.
    """
    most = round(count * share)
    left = Counter(label for labels in classes or () for label in labels)
    held: list[int] = []
    for i in torch.randperm(count, generator=torch.Generator().manual_seed(SEED)).tolist():
        labels = () if classes is None else classes[i]
        if len(held) < most and all(left[label] > 1 for label in labels):
            held.append(i)
            left.subtract(labels)
    if len(held) < 2:
        spared = " that are not the last of a class" if len(held) < most else ""
        raise UsageError(f"--kd-held-out: {share:g} of {count} images are {len(held)}{spared}; hold out two at least")
    chosen = set(held)
    return [i for i in range(count) if i not in chosen], held


def labels_of(images: Any) -> list[tuple[int]] | None:
    """The class of each image of a data set of timm or torchvision; None where they are not known."""
    inner = getattr(images, "images", images)
    labels = getattr(inner, "targets", getattr(inner, "labels", None))
    try:
        if labels is None:
            labels = [sample[1] for sample in getattr(inner, "reader", inner).samples]
        return [(int(label),) for label in labels] if len(labels) == len(images) else None
    except (TypeError, ValueError, LookupError, AttributeError):  # of a format of its own
        return None


class Judges(ABC):
    """What is computed on a held-out batch: that depends on the kind of model.

    Args:
        task: holds the student and its teachers.
        names: of the student's classes, in their order, where they are known.

    Attributes:
        student: as it is trained.
        teachers: those that predict the student's classes, as models of the student's images.
    """

    def __init__(self, task: DistillationTask, names: Sequence[str] | None = None) -> None:
        self.student: Any = task.get_eval_model()
        found = [judged(teacher, self.student, names) for teacher, _ in task.lessons]
        self.teachers = [model for model in found if model is not None]

    @abstractmethod
    def loss(self, images: Any, target: Any) -> Tensor:
        """The task's loss of the student, [] float32, with its graph."""

    @abstractmethod
    def errors(self, images: Any, target: Any) -> Tensor:
        """The errors of the student and of each teacher, [1 + teachers] float64, 0 at best."""


class Classifiers(Judges):
    """Cross-entropy, and the rate of wrong classes; the student normalises by the batch, as in training.

    Its running statistics lag behind while it learns. Its dropout takes part in the loss, as in training, but not in
    its errors, which are compared with those of teachers that have none.
    """

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        """See `Judges`."""
        return F.cross_entropy(self._logits(images).float(), target)

    def errors(self, images: Tensor, target: Tensor) -> Tensor:
        """See `Judges`."""
        with evaluated(self.student):
            student = self._logits(images)
        logits = [student, *(teacher(images) for teacher in self.teachers)]
        return torch.stack([(of.argmax(1) != target).double().mean() for of in logits])

    def _logits(self, images: Tensor) -> Tensor:
        with frozen_statistics(self.student):
            logits = self.student(images)
        first: Tensor = logits[0] if isinstance(logits, (tuple, list)) else logits
        return first


class HeldOutImages:
    """Measures the gradients, or the errors of student and teacher, on a held-out batch every few steps.

    Args:
        loader: of the held-out images, in one order.
        every: steps from one measurement to the next.
        judges: computes the loss, or the errors, on a batch.
        stepper: holds optimizer and weighting.
        autocast: makes the context of the forward pass.
        channels_last: memory format of the input.
        say: takes the line on what `Auto` has chosen.

    Raises:
        UsageError: student and teacher are to be compared, and no teacher predicts the student's classes.
    """

    def __init__(
        self,
        loader: Any,
        every: int,
        judges: Judges,
        stepper: Stepper,
        autocast: Callable[[], AbstractContextManager[Any]],
        channels_last: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self._say = say
        assert isinstance(stepper.weighting, (HeldOut, Auto, WhileBetter))
        if isinstance(stepper.weighting, WhileBetter) and not judges.teachers:
            raise UsageError(
                "--kd-balance whilebetter: no teacher predicts the student's classes, so that their errors cannot be "
                "compared; choose another rule"
            )
        self._loader, self._every, self._weighting = loader, every, stepper.weighting
        self._judges, self._stepper, self._autocast, self._channels_last = judges, stepper, autocast, channels_last
        self._batches: Iterator[Any] = iter(())
        self._next = -1  # position of the batch that comes next

    def measure(self, updates: int, result: dict[str, Any]) -> None:
        """Set the weights, where it is time for that.

        Args:
            updates: steps so far.
            result: of the task, for the first micro-batch of a step; its graph stays.
        """
        weighting = self._weighting
        if updates % self._every or (not isinstance(weighting, WhileBetter) and weighting.done):
            return
        images, target = self._batch(updates // self._every)
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if isinstance(weighting, WhileBetter):
            student, *teachers = self._errors(images, target)
            weighting.observe(student, torch.stack(teachers).min())
            return
        with self._autocast():
            loss = self._judges.loss(images, target)
        if loss.device.type == "cpu" and not loss.isfinite():
            return  # as on a GPU, where the host does not know; training finds out by its own losses
        dk.measure_held_out(
            self._stepper.optimizer, losses_of(result), loss, weighting=weighting, scaler=self._stepper.scaler
        )
        if weighting.done and isinstance(weighting, Auto) and (line := weighting.report()):
            self._say(line)

    @torch.no_grad()
    def _errors(self, images: Any, target: Any) -> Tensor:
        """Of `Judges`, the means over all processes."""
        with self._autocast():
            errors = self._judges.errors(images, target)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(errors)
            errors /= torch.distributed.get_world_size()
        return errors

    def _batch(self, number: int) -> Any:
        """The batch of a measurement, whatever came before: a resumed run takes the same."""
        place = number % len(self._loader)
        with kept():  # torch's loader draws a seed when it begins, which a resumed run does at another step
            if place != self._next or place == 0:
                self._batches = iter(self._loader)
                for _ in range(place):
                    next(self._batches)
            self._next = place + 1
            return next(self._batches)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch normalization over the batch, as in training, that leaves the running statistics alone."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, but for batch normalization, which stays in its own."""
    changed = [m for m in model.modules() if m.training and not isinstance(m, _BatchNorm)]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True
