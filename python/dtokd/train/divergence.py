"""Losses that are not finite: what they would spoil is put back, and many of them end a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..errors import Diverged
from .world import World

#: Batches in a row, or those of one epoch if it has fewer, but at least two: one bad batch is no divergence.
PATIENCE = 50


class Losses:
    """Means of an epoch's losses over the samples of all ranks, added up on the device, and those that are not finite.

    A value that is not finite counts for nothing in the means.

    Args:
        world: the processes that train together.
        state: of `state_dict`.
        row: scalar, of `row_on_device` of the epoch before.

    Attributes:
        bad: of `compute`: batches of all ranks with a value that is not finite.
        row: the length of the row of such batches, or of skipped ones, up to the last one, on the rank where it is
            longest.
        named: what was not finite in the last batch of a rank.
    """

    def __init__(self, world: World, state: dict[str, Any] | None = None, row: Tensor | None = None) -> None:
        self._world = world
        self._names: list[str] = state["names"] if state else []
        #: per name the sum, the number of samples, and whether the last one was bad; then `bad` and the row
        self._sums: Tensor | None = state["sums"] if state else None
        self._before = row
        self.bad, self.row = 0, 0
        self.named: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """To go on from."""
        return {"names": self._names, "sums": None if self._sums is None else self._sums.cpu()}

    @property
    def row_on_device(self) -> Tensor | None:
        """Scalar, the length of this rank's row, for the next epoch."""
        return None if self._sums is None else self._sums[-1]

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor], n: int, skipped: Tensor | None = None, *, steps: bool = True) -> None:
        """One batch; nothing waits for the device.

        Args:
            values: scalars, by name; the same names each time.
            n: its samples.
            skipped: scalar bool, whether a gradient was not finite, so that nothing was trained.
            steps: whether the batch ended a step; else, if it is finite, it does not end a row yet.
        """
        given = torch.stack([value.detach().double() for value in values.values()])
        if self._sums is None:
            self._names, self._sums = list(values), given.new_zeros(3 * len(values) + 2)
            if self._before is not None:
                self._sums[-1] = self._before
        self._sums = self._sums.to(given.device)
        finite = given.isfinite()
        sums, counts, last, (bad, row) = self._sums.split([*[len(values)] * 3, 2])
        sums += torch.where(finite, given, 0) * n
        counts += finite * n
        last.copy_(~finite)
        bad += last.amax()
        counts_on = last.amax() > 0
        if skipped is not None:
            counts_on = counts_on | skipped.to(counts_on.device)
        row.copy_(torch.where(counts_on, row + 1, 0 * row if steps else row))

    def compute(self) -> dict[str, float]:
        """The means over all ranks, with one copy to the host; NaN where no value was finite."""
        assert self._sums is not None
        K = len(self._names)
        rows = self._sums.new_zeros(self._world.size)
        rows[self._world.rank] = self._sums[-1]
        values = self._world.sum(torch.cat([self._sums[:-1], rows])).tolist()
        self.bad, self.row = int(values[3 * K]), int(max(values[3 * K + 1 :]))
        self.named = [name for name, bad in zip(self._names, values[2 * K : 3 * K], strict=True) if bad]
        sums = zip(self._names, values[:K], values[K : 2 * K], strict=True)
        return {name: value / count if count else math.nan for name, value, count in sums}

    def check(self, epoch: int, iteration: int, batches: int, skips: bool, lr: float) -> None:
        """Whether the run has diverged, by what `compute` found.

        Args:
            epoch, iteration: where it is, counted from 0, and the batches of this epoch so far.
            batches: of an epoch.
            skips: whether steps with such losses are skipped; else the first one spoils the parameters.
            lr: the learning rate that the options named.

        Raises:
            Diverged: it has.
        """
        if self.row < (max(2, min(PATIENCE, batches)) if skips else 1):
            return
        # the sum is not finite wherever a part of it is
        names = [name for name in self.named if name != "loss"] or self.named or ["a gradient"]
        what = f"{' and '.join(names)} {'was' if len(names) == 1 else 'were'} not finite"
        if skips:
            what += f" for {self.row} batches in a row"
        raise diverged(epoch, iteration, what, lr)


def diverged(epoch: int, iteration: int, what: str, lr: float) -> Diverged:
    """The one sentence that ends a run.

    Args:
        epoch, iteration: where it is, counted from 0, and the batches of this epoch so far.
        what: was not finite.
        lr: the learning rate that the options named.
    """
    return Diverged(
        f"the run has diverged: in epoch {epoch + 1}, up to iteration {iteration}, {what}; start anew with a --lr "
        f"below {lr:.3g}, a smaller --clip-grad or more --warmup-epochs; nothing of this epoch is saved, and the "
        "checkpoints and the report of the finished epochs are as they were"
    )


class Statistics:
    """What a forward pass with numbers that are not finite would spoil for good: the layers' running statistics."""

    def __init__(self, task: TrainingTask) -> None:
        self._modules: list[nn.Module] = [
            unwrap_model(task.get_trainable_module(ema=ema)) for ema in ([False, True] if task.has_ema() else [False])
        ]
        found = [b for m in self._modules for b in m.buffers() if b.is_floating_point()]
        # a mask of -inf is no statistic
        self._buffers = [b for b, finite in zip(found, _finite(found), strict=True) if finite]
        self._kept = [b.detach().clone() for b in self._buffers]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember them."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def mend(self) -> None:
        """Put back those that are not finite as they were when last remembered."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            buffer.copy_(torch.where(buffer.isfinite(), buffer, kept))

    def spoiled(self) -> str | None:
        """The name of a parameter or of statistics that are not finite now."""
        ours = set(map(id, self._buffers))
        named: list[tuple[str, Tensor]] = [pair for m in self._modules for pair in m.named_parameters()]
        named += [pair for m in self._modules for pair in m.named_buffers() if id(pair[1]) in ours]
        finite = _finite([tensor for _, tensor in named])
        return next((name for (name, _), good in zip(named, finite, strict=True) if not good), None)


def _finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Of each tensor whether all of it is finite; one copy to the host."""
    return torch.stack([t.detach().isfinite().all() for t in tensors]).tolist() if tensors else []
