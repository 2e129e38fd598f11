"""The training loop: losses -> backward -> step. The host waits for the device only where a line is written."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from torch import Tensor

from ..monitor import BalanceLogger
from .progress import Progress
from .steps import Stepper


class Stopped(Exception):
    """Ctrl-C, or a signal that ends the process, between two iterations."""


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
        stopped: whether the user wants out.
        updates: optimizer steps so far.
    """

    task: TrainingTask
    stepper: Stepper
    scheduler: Scheduler | None
    options: argparse.Namespace
    device: torch.device
    log: BalanceLogger | None
    progress: Progress
    stopped: Callable[[], bool]
    updates: int = 0

    def train_epoch(self, loader: Any, epoch: int) -> dict[str, float]:
        """One pass over the data, as timm's train.py makes it.

        Returns:
            Mean losses: "loss", the weighted sum, and each objective by its name.

        Raises:
            Stopped: in between.
        """
        self.task.train()
        self.stepper.optimizer.zero_grad()
        count, accumulate = len(loader), self.options.grad_accum_steps
        last_group = count - (count % accumulate or accumulate)  # where the last, perhaps shorter, accumulation begins
        means = _Means()
        with self.progress.epoch(epoch, count) as shown:
            for index, (input, target) in enumerate(loader):
                if self.options.channels_last:
                    input = input.contiguous(memory_format=torch.channels_last)
                share = count - last_group if index >= last_group else accumulate
                # of cached teachers, see `data.collate_keyed`
                keys = (target[:, 1:],) if getattr(self.options, "kd_cache_teacher", None) else ()
                with self._autocast():
                    result = self.task(input, target[:, 0] if keys else target, *keys)
                self.stepper.backward(result, share)
                means.add({"loss": result["loss"], **result["objectives"]}, len(input))
                if (index + 1) % accumulate == 0 or index + 1 == count:
                    self._step()
                if (index + 1) % self.options.log_interval == 0 or index + 1 == count:
                    shown.line(index + 1, means.compute(), self.stepper.optimizer.param_groups[0]["lr"])
                else:
                    shown.advance(index + 1)
                if self.stopped() and index + 1 < count:
                    raise Stopped
        return means.compute()

    def _step(self) -> None:
        self.stepper.step()
        if self.log is not None and self.stepper.balance is not None:
            self.log.log(self.stepper.balance)
        self.updates += 1
        self.task.update_ema(step=self.updates)
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates=self.updates)

    @torch.no_grad()
    def evaluate(self, loader: Any, ema: bool = False) -> dict[str, float]:
        """The student on the validation split: loss, top1, top5 (percent)."""
        model = self.task.get_eval_model(ema=ema)
        return evaluate(model, loader, self.task.create_evaluator(), self._autocast, self.options.channels_last)

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.options.amp:
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.options.amp_dtype))


@torch.no_grad()
def evaluate(
    model: Any,
    loader: Any,
    evaluator: Any,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    channels_last: bool = False,
) -> dict[str, float]:
    """A classifier over a loader.

    Args:
        model: images to logits, or to several of which the first counts.
        loader: of (input, target).
        evaluator: timm's; it adds up on the device.
        autocast: makes the context of the forward pass.
        channels_last: memory format of the input.

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
    return dict(evaluator.compute())


class _Means:
    """Means over samples, added up on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def add(self, values: dict[str, Tensor], n: int) -> None:
        for name, value in values.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros((), dtype=torch.float64, device=value.device)
            self._sums[name] += value.detach() * n
        self._count += n

    def compute(self) -> dict[str, float]:
        """One copy to the host."""
        values = torch.stack(list(self._sums.values())).tolist()
        return {name: value / self._count for name, value in zip(self._sums, values, strict=True)}
