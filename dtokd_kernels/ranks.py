"""What a balanced step asks of the other ranks, and the one small all-reduce with which they agree."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .types import MAX_OBJECTIVES
from .watch import Watch


def initialized() -> bool:
    """Whether torch.distributed is there and initialized, so that there may be other ranks."""
    return dist.is_available() and dist.is_initialized()


class Ranks:
    """The processes of a group that train one model on different samples. A subclass says how gradients meet.

    Attributes:
        op: what error messages call the backward passes.
        group: the process group; None for the default one.
        size: how many ranks it has.
        unsynced: whether the gradient sets hold gradients that the other ranks have not seen.
        each_part: whether each part of an accumulated batch is reduced, inside a `no_sync` too: `backward` for other
            optimizers weighs the parts one by one.
    """

    #: whether a rank's gradients are a part of the parameters, so that Gram matrices are sums over ranks
    shards = False

    def __init__(self, group: dist.ProcessGroup | None, op: str, each_part: bool = False) -> None:
        self.group, self.op, self.each_part = group, op, each_part
        self.size = dist.get_world_size(group)
        self.unsynced = False
        self._closed = False

    @property
    def syncs(self) -> bool:
        """Whether the next backward passes reduce gradients; not inside `no_sync`, unless each part is reduced."""
        return self.each_part or not self._closed

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let `optimizer.backward` inside add to this rank's gradients only; the next one outside reduces the sum."""
        before, self._closed = self._closed, True
        try:
            yield
        finally:
            self._closed = before

    def cleared(self) -> None:
        """The gradient sets hold nothing, or zeros."""
        self.unsynced = False

    def adopt(self, params: Sequence[Tensor]) -> None:
        """Train these parameters too, of a group that an optimizer is given later; all ranks call it.

        Raises:
            ValueError: they are not laid out as the others are.
        """
        raise NotImplementedError

    def agrees_before(self, one_pass: bool) -> bool:
        """Whether `agree` comes before the backward passes of a call; else losses travel with the Gram matrices."""
        return one_pass or (self.syncs and not self.shards)

    def agree(self, losses: Tensor, names: Sequence[str], passes: int, op: str) -> Tensor:
        """The losses [K] float64, averaged over the ranks: one all-reduce of 11 numbers.

        Raises:
            RuntimeError: another rank refused its losses, or has other objectives. Read on CPU tensors only: on
                other devices reading would stall, and the ranks that wait are ended by the group's timeout.
        """
        kind = zlib.crc32(repr((tuple(names), passes, self.syncs)).encode()) % (1 << 20)
        packed = self._exchange(losses, kind, refused=False)
        if packed.device.type == "cpu":
            errors, kinds, squares = packed[MAX_OBJECTIVES:].tolist()
            if errors:
                raise RuntimeError(
                    f"{op}: {int(errors)} of {self.size} ranks raised an error about their losses; "
                    "no rank has changed anything"
                )
            if self.size * squares != kinds * kinds:  # equal only if all are the same
                raise RuntimeError(
                    f"{op}: the ranks differ in their objectives, here {list(names)}, or in being inside no_sync(); "
                    "call backward alike on all of them, and give a rank without samples the loss 0 * output.sum()"
                )
        return packed[: len(losses)] / self.size

    def refuse(self) -> None:
        """Tell the ranks that wait in `agree` that this one raises an error; others end at the group's timeout."""
        if self.syncs and not self.shards and dist.get_backend(self.group) == "gloo":
            self._exchange(torch.zeros(0, dtype=torch.float64), 0, refused=True)

    def _exchange(self, losses: Tensor, kind: int, refused: bool) -> Tensor:
        packed = losses.new_zeros(MAX_OBJECTIVES + 3)
        packed[: len(losses)] = losses
        for place, number in enumerate((float(refused), float(kind), float(kind) ** 2), MAX_OBJECTIVES):
            packed[place].fill_(number)  # where the losses are: a copy of the host's numbers would wait
        return self.sum(packed)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def start(self, i: int, row: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What `.grad` of the parameters is when pass i, which adds to this row, begins."""
        return list(row)

    def result(self, i: int, params: Sequence[Tensor]) -> list[Tensor | None]:
        """What the row is after the pass."""
        return [p.grad for p in params]

    def passing(
        self, i: int, K: int, params: Sequence[Tensor], row: Sequence[Tensor | None], watch: Watch | None
    ) -> AbstractContextManager[None]:
        """Context of backward pass i of K, which fills each parameter's `.grad`; `watch` is shown what it becomes."""
        raise NotImplementedError

    def average(self, rows: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor | None]]:
        """Gradients that came from `torch.autograd.grad`, averaged over the ranks."""
        raise NotImplementedError

    def sample_gram(self, gram: Tensor) -> Tensor:
        """The Gram matrix of gradients at a representation, whose samples are divided over the ranks.

        The mean loss of all ranks has 1 / n of each rank's gradient at that rank's samples.
        """
        return self.sum(gram / self.size**2)

    def total(self, grams: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Gram matrices [3, K, K] over all parameters and the averaged losses: one all-reduce, if ranks have shards."""
        if not self.shards:
            return grams, losses
        packed = torch.cat([grams.flatten(), losses.to(grams.device)])
        dist.all_reduce(packed, group=self.group)
        whole, mean = packed.split([grams.numel(), len(losses)])
        return whole.view_as(grams), (self.sum_replicas(mean) / self.size).to(losses.device)

    def sum_replicas(self, tensor: Tensor) -> Tensor:
        """Over ranks that hold the same shards, in place; there is one of each, but for HSDP."""
        return tensor

    def zeros(self, p: Tensor, dtype: torch.dtype | None) -> Tensor:
        """A moment's start."""
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def master(self, p: Tensor) -> Tensor:
        """A float32 copy of a parameter, for its state."""
        return p.detach().to(torch.float32, copy=True)

    def part(self, whole: Tensor, p: Tensor) -> Tensor:
        """What this rank keeps of a whole moment of a parameter."""
        return whole

    def shape_of(self, p: Tensor) -> torch.Size:
        """The shape of a moment of a parameter, as a checkpoint of all ranks has it."""
        return p.shape

    def after_updates(self) -> None:
        """The updates of a step are done."""

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts of parameters or gradients."""
        return list(tensors)

    def local_rows(
        self, params: list[Tensor], states: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """This rank's parts of the parameters that a step updates, and of their state; asked in each step."""
        return params, states
