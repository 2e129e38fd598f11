"""Ranks that all have what this one has, for collectives on tensors that say they are on a GPU: nothing is sent."""

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
def ranks(size: int) -> Iterator[None]:
    """Inside, torch.distributed's default group has so many ranks."""

    def all_reduce(tensor: Tensor, **options: Any) -> Done:
        tensor.mul_(size)
        return Done()

    def reduce_scatter(out: Tensor, whole: Tensor, **options: Any) -> Done:
        out.copy_(whole[: len(out)]).mul_(size)
        return Done()

    def all_gather(out: Tensor, part: Tensor, **options: Any) -> Done:
        out.view(size, -1).copy_(part)
        return Done()

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        with (
            mock.patch.multiple(dist, all_reduce=all_reduce, broadcast=lambda tensor, **options: Done()),
            mock.patch.multiple(sharded, _reduce_scatter=reduce_scatter, _all_gather=all_gather),
        ):
            yield
    finally:
        dist.destroy_process_group()
