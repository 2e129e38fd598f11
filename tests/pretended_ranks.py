"""Ranks that all have what this one has: nothing is sent, so tensors may say that they are on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dtokd_kernels.distributed import sharded


class Done:
    """A communication that is over."""

    def wait(self) -> None:
        pass


@contextmanager
def ranks(size: int, rank: int = 0) -> Iterator[None]:
    """Inside, torch.distributed's default group has so many ranks, and this is one of them."""

    def all_reduce(tensor: Tensor, **options: Any) -> Done:
        tensor.mul_(size)
        return Done()

    def reduce_scatter(out: Tensor, whole: Tensor, **options: Any) -> Done:
        out.copy_(whole.view(size, -1)[rank]).mul_(size)
        return Done()

    def all_gather(out: Tensor, part: Tensor, **options: Any) -> Done:
        out.view(size, -1).copy_(part)
        return Done()

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with (
            mock.patch.multiple(dist, all_reduce=all_reduce, broadcast=lambda tensor, **options: Done()),
            mock.patch.multiple(sharded, _reduce_scatter=reduce_scatter, _all_gather=all_gather),
        ):
            yield
    finally:
        dist.destroy_process_group()
