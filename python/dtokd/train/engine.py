"""The training loop: losses -> backward -> step. The host waits for the device only where a line is written."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task.evaluator import evaluation_sample_limit
from torch import Tensor

from ..datafree.loader import SyntheticBatches
from ..errors import UsageError
from ..lopsided import LopsidedWeights
from ..monitor import BalanceLogger
from ..objectives.task import DistillationTask
from .divergence import Losses, Statistics, diverged
from .heldout import HeldOutImages
from .progress import Progress
from .randomness import kept
from .signals import Stopped
from .steps import Stepper
from .world import World


@dataclass
class Engine:
    """One run's moving parts.

    Attributes:
        task: student, teacher, losses.
        stepper: what a loss becomes.
        scheduler: timm's, or none.
        options: grad_accum_steps, amp, amp_dtype, log_interval, channels_last.
        device: of the student.
        log: of the balanced steps.
        progress: what the user sees.
        stopped: the number of the signal with which the user wants out, or 0.
        updates: optimizer steps so far.
        names: of the classes, in their order, where the data has names.
        data: of the training data, `identity.of_dataset`, where the data has one.
        groups: the options of each of the optimizer's groups, see `state.told_of`.
        per_epoch: optimizer steps in an epoch.
        ahead: steps that the schedule counts besides `updates`, where earlier epochs had another number of them.
        world: the processes that train together.
        lopsided: of the balanced steps, where the weighting may give all to one objective.
        held_out: sets the weights by images that are not trained on, where the weighting asks for that.
        judged: what the last evaluation has counted.
        teacher_seconds: that the teachers have taken in the last epoch, on their device.
    """

    task: DistillationTask
    stepper: Stepper
    scheduler: Scheduler | None
    options: argparse.Namespace
    device: torch.device
    log: BalanceLogger | None
    progress: Progress
    stopped: Callable[[], int]
    updates: int = 0
    names: list[str] | None = None
    data: str | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    per_epoch: int = 0
    ahead: int = 0
    world: World = field(default_factory=World)
    lopsided: LopsidedWeights | None = None
    held_out: HeldOutImages | None = None
    judged: Any = None
    teacher_seconds: float = 0.0
    _spoken: bool = False  # a line from the first seconds on, before --log-interval iterations are done
    _row: Tensor | None = None  # of batches that were not finite, at the end of the last epoch

    def train_epoch(
        self, loader: Any, epoch: int, begin: int = 0, means: dict[str, Any] | None = None
    ) -> dict[str, float]:
        """One pass over the data, as timm's train.py makes it.

        Args:
            loader: of (input, target).
            epoch: its number, from 0.
            begin: batches that were used before; the loader leaves them out, but counts them.
            means: of these, from `Stopped`.

        Returns:
            Mean losses, over the batches where they are finite: "loss", the weighted sum, and each objective by its
            name.

        Raises:
            Stopped: in between.
            Diverged: `divergence.PATIENCE` batches in a row, or all of a shorter epoch, were not finite; or one was,
                and the stepper does not skip it; or a parameter is not finite at the end. It is looked for where a
                line is written.
            UsageError: the balance refuses a loss.
        """
        self.task.train()
        self.stepper.optimizer.zero_grad()
        count, accumulate = len(loader), self.options.grad_accum_steps
        last_group = count - (count % accumulate or accumulate)  # where the last, perhaps shorter, accumulation begins
        sums = Losses(self.world, means, self._row)
        statistics = Statistics(self.task)
        images, self.teacher_seconds = 0, 0.0
        with self.progress.epoch(epoch, count, begin) as shown:
            for index, (input, target) in enumerate(loader, start=begin):
                if self.options.channels_last:
                    input = input.contiguous(memory_format=torch.channels_last)
                share = count - last_group if index >= last_group else accumulate
                steps = (index + 1) % accumulate == 0 or index + 1 == count
                with nullcontext() if steps else self.task.no_sync():
                    with self.autocast():
                        result = self.task(input, target)
                    if self.held_out is not None and index % accumulate == 0:
                        self.held_out.measure(self.updates, result)
                    self._backward(result, share, epoch, index)
                if steps:
                    self._step()
                losses = {"loss": result["loss"], **result["objectives"]}
                sums.add(losses, len(input), self._skipped() if steps else None, steps=steps)
                images += len(input) * self.world.size
                told = (index + 1) % self.options.log_interval == 0 or index + 1 == count
                if told or not self._spoken:
                    self._spoken = True
                    shown.line(index + 1, sums.compute(), self.stepper.lr, images)
                    self.teacher_seconds += self.task.watch.take()
                else:
                    shown.advance(index + 1, images)
                if told:
                    with self.world.agreed():
                        self._check(epoch, index + 1, count, sums, statistics)
                if (signal := self.stopped()) and steps and index + 1 < count:
                    statistics.mend()
                    raise Stopped(signal, index + 1, sums.state_dict())
        means = sums.compute()
        self._row = sums.row_on_device
        if sums.bad:
            self.progress.say(
                f"epoch {epoch + 1}/{self.progress.epochs}  {sums.bad} of {count * self.world.size} batches had a loss "
                "that is not finite" + ("; their steps were skipped" if self.stepper.skips else "")
            )
        return means

    def estimate(self, loader: Any) -> None:
        """Show the task the first batches, where an objective needs statistics of its teacher before the first step.

        Random numbers, and a loader that makes its images, go on as if it had not been. All ranks call it.

        Args:
            loader: of (input, target).

        Raises:
            UsageError: a teacher's features give no statistics.
        """
        if self.task.settled:
            return
        before = copy.deepcopy(loader.whole_state()) if isinstance(loader, SyntheticBatches) else None
        with kept():
            for input, target in islice(loader, self.options.kd_statistics_batches):
                if self.options.channels_last:
                    input = input.contiguous(memory_format=torch.channels_last)
                with self.autocast():
                    self.task.observe(input, target)
        if before is not None:
            loader.load_whole_state(before)
        self.task.settle()

    def _backward(self, result: dict[str, Any], parts: int, epoch: int, index: int) -> None:
        try:
            self.stepper.backward(result, parts)
        except ValueError as error:  # of the balance, such as a loss below 0
            place = f"epoch {epoch + 1}, iteration {index + 1}"
            raise UsageError(f"--kd-balance {self.options.kd_balance}: {place}: {error}") from error

    def _skipped(self) -> Tensor | None:
        """Whether a gradient of the last step was not finite; a scaler looks for its scale by such steps."""
        searching = self.options.amp and self.options.amp_dtype == "float16"
        balance = None if searching else self.stepper.balance
        return None if balance is None else ~balance.norm.isfinite()

    def _check(self, epoch: int, done: int, count: int, sums: Losses, statistics: Statistics) -> None:
        """Raises Diverged, see `train_epoch`; else there is nothing in the model that is not finite."""
        # before the schedule
        lr = max(group.get("initial_lr", group["lr"]) for group in self.stepper.optimizer.param_groups)
        sums.check(epoch, done, count, self.stepper.skips, lr)
        if sums.bad:
            statistics.mend()
        statistics.keep()
        if done == count and (name := statistics.spoiled()):
            raise diverged(epoch, done, f"{name} was not finite", lr)

    def _step(self) -> None:
        self.stepper.step()
        if self.log is not None and self.stepper.balance is not None:
            self.log.log(self.stepper.balance)
        self.updates += 1
        self.task.update_ema(step=self.updates)
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates=self.updates + self.ahead)

    @torch.no_grad()
    def evaluate(self, loader: Any, ema: bool = False) -> dict[str, float]:
        """The student on the validation split: loss, top1, top5 (percent)."""
        model = self.task.get_eval_model(ema=ema)
        self.judged = self.make_evaluator(loader)
        return evaluate(
            model, loader, self.judged, self.autocast, self.options.channels_last, distributed=self.world.joined
        )

    def make_evaluator(self, loader: Any) -> Any:
        """What judges the student, or a teacher of the same classes, on this rank's share of a loader's samples."""
        # several ranks see a sample twice where their number does not divide that of the samples
        limit = evaluation_sample_limit(loader)
        return self.task.create_evaluator(**({} if limit is None else {"max_samples": limit}))

    def autocast(self) -> AbstractContextManager[Any]:
        """Around the student's forward passes."""
        return autocast(self.options, self.device)


def autocast(options: argparse.Namespace, device: torch.device) -> AbstractContextManager[Any]:
    """Around forward passes: the precision of `--amp` and `--amp-dtype`."""
    if not options.amp:
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, options.amp_dtype))


@torch.no_grad()
def evaluate(
    model: Any,
    loader: Any,
    evaluator: Any,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    channels_last: bool = False,
    distributed: bool = False,
) -> dict[str, float]:
    """A classifier over a loader.

    Args:
        model: images to logits, or to several of which the first counts.
        loader: of (input, target).
        evaluator: timm's; it adds up on the device.
        autocast: makes the context of the forward pass.
        channels_last: memory format of the input.
        distributed: whether the loader has a part of the samples, and other ranks the others.

    Returns:
        The evaluator's metrics.
    """
    model.eval()
    for input, target in loader:
        if channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        with autocast():
            output = model(input)
        evaluator.update(output[0] if isinstance(output, (tuple, list)) else output, target)
    return dict(evaluator.compute(distributed=True) if distributed else evaluator.compute())
