"""Images that are never trained on, which set the weights (`--kd-balance heldout`, `auto`, `whilebetter`)."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset, IterableDataset

import dtokd_kernels as dk
from dtokd_kernels.weighting import Auto, HeldOut, WhileBetter

from ..errors import UsageError
from ..objectives.taps import Taps
from ..objectives.task import DistillationTask
from ..objectives.teacher import Teacher
from .options import HELD_OUT, LOOKING
from .steps import Stepper, losses_of

#: Of the choice of images.
SEED = 20_17


class Part(Dataset[Any]):
    """Some samples of a data set, with a transform of their own.

    Args:
        images: of `data.open_dataset`.
        positions: of the samples.
    """

    def __init__(self, images: Any, positions: list[int]) -> None:
        # the files are shared, the transform is not
        self.whole = copy.copy(images)
        self.whole.images = copy.copy(images.images)
        self.images, self.positions = self.whole.images, positions

    @property
    def transform(self) -> Any:
        """Of these samples alone."""
        return self.whole.transform

    @transform.setter
    def transform(self, value: Any) -> None:
        self.whole.transform = value

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Any:
        return self.whole[self.positions[index]]


def check(options: argparse.Namespace) -> None:
    """Refuse a rule without held-out images, and held-out images without a rule that looks at them.

    Raises:
        UsageError: names the options.
    """
    share = getattr(options, "kd_held_out", 0.0)
    looks = options.kd_balance in LOOKING
    if looks and "kd_held_out" not in options:
        raise UsageError(
            f"--kd-balance {options.kd_balance}: dtokd detect has no held-out images yet; choose another rule"
        )
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
    count = round(len(images) * options.kd_held_out)
    if count < 2:
        raise UsageError(
            f"--kd-held-out: {options.kd_held_out:g} of {len(images)} images are {count}; hold out two at least"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED)).tolist()
    return Part(images, sorted(order[count:])), Part(images, order[:count])


class HeldOutImages:
    """Measures the gradients, or the errors of student and teacher, on a held-out batch every few steps.

    Args:
        loader: of the held-out images, in one order.
        every: steps from one measurement to the next.
        task: holds the student and its teachers.
        stepper: holds optimizer and weighting.
        autocast: makes the context of the forward pass.
        channels_last: memory format of the input.
        say: takes the line on what `Auto` has chosen.

    Raises:
        UsageError: student and teacher are to be compared, and no teacher has the student's classes.
    """

    def __init__(
        self,
        loader: Any,
        every: int,
        task: TrainingTask,
        stepper: Stepper,
        autocast: Callable[[], AbstractContextManager[Any]],
        channels_last: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self._say = say
        assert isinstance(stepper.weighting, (HeldOut, Auto, WhileBetter))
        if isinstance(stepper.weighting, WhileBetter):
            self._teachers = _classifiers(task)
        self._loader, self._every, self._weighting = loader, every, stepper.weighting
        self._task, self._stepper, self._autocast, self._channels_last = task, stepper, autocast, channels_last
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
        student = self._task.get_eval_model()
        compares = isinstance(weighting, WhileBetter)
        with frozen_statistics(student), self._autocast(), torch.set_grad_enabled(not compares):
            logits = student(images)
            logits = logits[0] if isinstance(logits, (tuple, list)) else logits
            loss = F.cross_entropy(logits.float(), target)
        if isinstance(weighting, WhileBetter):
            weighting.observe(*self._errors(images, logits, target))
            return
        if loss.device.type == "cpu" and not loss.isfinite():
            return  # as on a GPU, where the host does not know; training finds out by its own losses
        dk.measure_held_out(
            self._stepper.optimizer, losses_of(result), loss, weighting=weighting, scaler=self._stepper.scaler
        )
        if weighting.done and isinstance(weighting, Auto) and (line := weighting.report()):
            self._say(line)

    @torch.no_grad()
    def _errors(self, images: Tensor, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Error rates of the student and of the best teacher, over all processes."""
        with self._autocast():
            taught = [teacher(images, Taps(logits=True)).logits for teacher in self._teachers]
        rates = torch.stack([(of.argmax(1) != target).double().mean() for of in (logits, *taught) if of is not None])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(rates)
            rates /= torch.distributed.get_world_size()
        return rates[0], rates[1:].min()

    def _batch(self, number: int) -> Any:
        """The batch of a measurement, whatever came before: a resumed run takes the same."""
        place = number % len(self._loader)
        if place != self._next or place == 0:
            self._batches = iter(self._loader)
            for _ in range(place):
                next(self._batches)
        self._next = place + 1
        return next(self._batches)


def _classifiers(task: TrainingTask) -> list[Teacher]:
    """The teachers that have the student's classes.

    Raises:
        UsageError: none has.
    """
    assert isinstance(task, DistillationTask)
    student: Any = task.get_eval_model()
    teachers = [teacher for teacher, _ in task.lessons]
    found = [t for t in teachers if getattr(t.model, "num_classes", None) == student.num_classes]
    if not found:
        raise UsageError(
            f"--kd-balance whilebetter: no teacher has a classifier for the student's {student.num_classes} classes, "
            "so that their errors cannot be compared; choose another rule"
        )
    return found


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
