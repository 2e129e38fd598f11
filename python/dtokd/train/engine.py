"""The training loop: losses -> backward -> step. The host waits for the device only where a line is written."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.task.evaluator import evaluation_sample_limit
from torch import Tensor

from ..errors import Diverged, ToldElsewhere, UsageError
from ..monitor import BalanceLogger
from .divergence import Divergence
from .progress import Progress
from .steps import Stepper
from .world import World


class Stopped(Exception):
    """A signal that ends the process, between two steps.

    Attributes:
        signal: its number.
        batches: those of this epoch that were used.
        means: the losses so far, for `Engine.train_epoch`.
    """

    def __init__(self, signal: int, batches: int = 0, means: dict[str, Any] | None = None) -> None:
        super().__init__(f"signal {signal}")
        self.signal, self.batches, self.means = signal, batches, means


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
        groups: what the options say of each of the optimizer's groups, see `state.told_of`.
        per_epoch: optimizer steps in an epoch.
        ahead: steps that the schedule counts besides `updates`, where earlier epochs had another number of them.
        world: the processes that train together.
        divergence: counts losses that are not finite, from epoch to epoch.
    """

    task: TrainingTask
    stepper: Stepper
    scheduler: Scheduler | None
    options: argparse.Namespace
    device: torch.device
    log: BalanceLogger | None
    progress: Progress
    stopped: Callable[[], int]
    updates: int = 0
    groups: list[dict[str, Any]] = field(default_factory=list)
    per_epoch: int = 0
    ahead: int = 0
    world: World = field(default_factory=World)
    divergence: Divergence | None = None

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
            Mean losses: "loss", the weighted sum, and each objective by its name.

        Raises:
            Stopped: in between.
            Diverged: the losses are not finite any more; see `divergence`. It is looked for where a line is written.
            UsageError: the balance refuses a loss.
        """
        self.task.train()
        self.stepper.optimizer.zero_grad()
        count, accumulate = len(loader), self.options.grad_accum_steps
        if self.divergence is None:
            self.divergence = Divergence(count)
        last_group = count - (count % accumulate or accumulate)  # where the last, perhaps shorter, accumulation begins
        sums = _Means(self.world, means)
        with self.progress.epoch(epoch, count, begin) as shown:
            for index, (input, target) in enumerate(loader, start=begin):
                if self.options.channels_last:
                    input = input.contiguous(memory_format=torch.channels_last)
                share = count - last_group if index >= last_group else accumulate
                # of cached teachers, see `data.collate_keyed`
                keys = (target[:, 1:],) if getattr(self.options, "kd_cache_teacher", None) else ()
                steps = (index + 1) % accumulate == 0 or index + 1 == count
                with nullcontext() if steps else self.task.no_sync():
                    with self._autocast():
                        result = self.task(input, target[:, 0] if keys else target, *keys)
                    self._backward(result, share)
                losses = {"loss": result["loss"], **result["objectives"]}
                sums.add(losses, len(input))
                if steps:
                    self._step()
                self.divergence.add(losses, self._skipped())
                if (index + 1) % self.options.log_interval == 0 or index + 1 == count:
                    means, bad = sums.compute(self.divergence.counts)
                    shown.line(index + 1, means, self.stepper.optimizer.param_groups[0]["lr"])
                    self._check(bad, epoch, index + 1)
                else:
                    shown.advance(index + 1)
                if (signal := self.stopped()) and steps and index + 1 < count:
                    raise Stopped(signal, index + 1, sums.state_dict())
        return sums.compute()[0]

    def _backward(self, result: dict[str, Any], share: int) -> None:
        try:
            self.stepper.backward(result, share)
        except ValueError as error:  # of the balance: a loss below 0, or what does not go with --amp
            raise UsageError(f"--kd-balance {self.options.kd_balance}: {error}") from error

    def _skipped(self) -> Tensor | None:
        """Whether the last step was; a scaler looks for its scale by steps that are skipped."""
        searching = self.options.amp and self.options.amp_dtype == "float16"
        balance = None if searching else self.stepper.balance
        return None if balance is None else balance.skipped

    def _check(self, bad: list[float], epoch: int, iteration: int) -> None:
        assert self.divergence is not None
        group = self.stepper.optimizer.param_groups[0]
        lr = group.get("initial_lr", group["lr"])  # before the schedule
        remedy = (
            f"start anew with a --lr below {lr:.3g}, a --clip-grad or more --warmup-epochs; the checkpoints and the "
            "report of the finished epochs are as they were"
        )
        try:
            self.divergence.check(bad, epoch, iteration, remedy)
        except Diverged as error:  # the same on all ranks
            raise error if self.world.first else ToldElsewhere(str(error)) from error

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
        # several ranks see a sample twice where their number does not divide that of the samples
        limit = evaluation_sample_limit(loader)
        evaluator = self.task.create_evaluator(**({} if limit is None else {"max_samples": limit}))
        return evaluate(
            model, loader, evaluator, self._autocast, self.options.channels_last, distributed=self.world.joined
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.options, self.device)


def autocast(options: argparse.Namespace, device: torch.device) -> AbstractContextManager[Any]:
    """Around forward passes: what `--amp` and `--amp-dtype` say."""
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


class _Means:
    """Means over the samples of all ranks, added up on the device."""

    def __init__(self, world: World, state: dict[str, Any] | None = None) -> None:
        self._world = world
        self._sums: dict[str, Tensor] = dict(state["sums"]) if state else {}
        self._count: int = state["count"] if state else 0

    def state_dict(self) -> dict[str, Any]:
        """To go on from."""
        return {"sums": {name: value.cpu() for name, value in self._sums.items()}, "count": self._count}

    @torch.no_grad()
    def add(self, values: dict[str, Tensor], n: int) -> None:
        for name, value in values.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros((), dtype=torch.float64, device=value.device)
            self._sums[name] = self._sums[name].to(value.device).add_(value.detach() * n)
        self._count += n

    def compute(self, more: Tensor | None = None) -> tuple[dict[str, float], list[float]]:
        """The means over the samples, and those of `more` over the ranks, with one copy to the host."""
        values = torch.stack([*self._sums.values(), next(iter(self._sums.values())).new_tensor(self._count)])
        if more is not None:
            values = torch.cat([values, more.to(values.device)])
        found = self._world.sum(values).tolist()
        count, others = found[len(self._sums)], found[len(self._sums) + 1 :]
        means = {name: value / count for name, value in zip(self._sums, found[: len(self._sums)], strict=True)}
        return means, [value / self._world.size for value in others]
