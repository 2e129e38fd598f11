"""The processes that train one model under torchrun: who writes, and how they agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.utils import random_seed
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..errors import ToldElsewhere, UsageError
from ..files import writing

T = TypeVar("T")


class World:
    """A process among others that train the same model, or alone.

    Each method is a collective operation unless its text excludes that: all ranks call it, in the same order.

    Args:
        control: a gloo group, whose messages nothing on a device waits for; None: alone.
        local_rank: number of this process on its machine.

    Attributes:
        joined: whether there is a process group, be it of one rank.
        rank, size: of the process group.
        first: whether this rank prints and writes for all.
    """

    def __init__(self, control: dist.ProcessGroup | None = None, local_rank: int = 0) -> None:
        self._control, self.local_rank = control, local_rank
        self.joined = control is not None
        self.rank = dist.get_rank() if self.joined else 0
        self.size = dist.get_world_size() if self.joined else 1
        self.first = self.rank == 0
        self._vote: tuple[Tensor, Any] | None = None

    def device(self, name: str) -> torch.device:
        """`--device`, or the CPU where torch has no GPU; of several GPUs this process's. No collective.

        Raises:
            UsageError: torch has no such device, or there are more processes than GPUs.
        """
        if name == "cuda" and not torch.cuda.is_available():
            return torch.device("cpu")
        with _named(name):
            device = torch.device(name)
        if self.joined and device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise UsageError(
                    f"--device: process {self.local_rank} of this machine has no GPU of its own, there are "
                    f"{torch.cuda.device_count()}; pass torchrun --nproc-per-node {torch.cuda.device_count()}"
                )
            torch.cuda.set_device(self.local_rank)
        if self.joined and device.type != "cpu":
            device = torch.device(device.type, self.local_rank)
        with _named(name):
            torch.zeros(1, device=device).cpu()  # meta has no numbers
        return device

    def apart(self, seed: int) -> None:
        """Seed this process's random generators as no other rank's: augmentation and dropout differ. No collective."""
        if self.rank:
            random_seed(seed, self.rank)

    def barrier(self) -> None:
        """Wait for all."""
        if self.joined:
            dist.barrier(group=self._control)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A UsageError on one rank becomes an error on all, and the first rank prints it.

        Raises:
            UsageError: on the first rank, the message of the lowest rank that had one.
            ToldElsewhere: on the others.
        """
        error: UsageError | None = None
        try:
            yield
        except UsageError as raised:
            if not self.joined:
                raise
            error = raised
        found = [text for text in self._all(None if error is None else str(error)) if text is not None]
        if found:
            raise UsageError(found[0]) if self.first else ToldElsewhere(found[0]) from error

    def first_does(self, work: Callable[[], T]) -> T:
        """What the first rank returns from this, which it alone does.

        Raises:
            UsageError: as `agreed`; also where it cannot write.
        """
        result: list[Any] = [None]
        with self.agreed():
            if self.first:
                with writing("the run's folder", "--output"):
                    result[0] = work()
        return self.shared(result[0])

    def shared(self, value: T) -> T:
        """The first rank's value."""
        held: list[Any] = [value]
        if self.joined:
            dist.broadcast_object_list(held, 0, group=self._control)
        return held[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in order, on the first; on the others an empty list."""
        if not self.joined:
            return [value]
        values: list[Any] = [None] * self.size
        dist.gather_object(value, values if self.first else None, 0, group=self._control)
        return values if self.first else []

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks, in place; on the tensor's device."""
        if self.joined:
            dist.all_reduce(tensor)
        return tensor

    def vote(self, number: int) -> int:
        """The greatest number that a rank gave in the call before; alone: this one.

        So all ranks see it at the same iteration, and none waits but for those that are more than one behind.
        """
        if not self.joined:
            return number
        before, given = self._vote, torch.tensor(number)
        self._vote = given, dist.all_reduce(given, dist.ReduceOp.MAX, group=self._control, async_op=True)
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])

    def _all(self, value: str | None) -> list[str | None]:
        values: list[str | None] = [value] * self.size
        if self.joined:
            dist.all_gather_object(values, value, group=self._control)
        return values


@contextmanager
def _named(name: str) -> Iterator[None]:
    """What torch refuses here is `--device`'s fault."""
    try:
        yield
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UsageError(
            f"--device: {name!r} cannot be used on this machine ({reason}); pass cpu, cuda, or one that torch has here"
        ) from error


@contextmanager
def join(device: str, timeout: float) -> Iterator[World]:
    """Meet the other processes that torchrun has started; alone without it.

    A process group of several ranks that is there is used. One of a single rank, as a program may have for other ends,
    is not.

    Args:
        device: nccl connects GPUs, gloo CPUs.
        timeout: seconds after which a rank that waits for another one gives up.

    Raises:
        RuntimeError: the others did not come.
    """
    there = dist.is_available() and dist.is_initialized()
    if there and dist.get_world_size() > 1:
        yield World(_control(timeout), int(os.environ.get("LOCAL_RANK", dist.get_rank())))
        return
    if there or not (dist.is_available() and under_torchrun()):
        yield World()
        return
    limit = timedelta(seconds=timeout)
    store, rank, size = next(rendezvous("env://", timeout=limit))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # gloo of torch 2.14 would find the addresses of the processes before a restart; agents of several machines may
        # count restarts differently
        store = PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.startswith("cuda") and torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    yield World(_control(timeout), int(os.environ.get("LOCAL_RANK", 0)))
    dist.destroy_process_group()  # after an error the process ends, and the others see its connections break


def _control(timeout: float) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    assert isinstance(group, dist.ProcessGroup)
    return group


def under_torchrun() -> bool:
    """Whether this process is one of several that were started to work together."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
