"""FSDP2 (`fully_shard`): every rank holds a shard of each parameter, gradient and moment, as DTensors.

FSDP's own hooks reduce-scatter the gradients of each backward pass. So a rank's Gram matrix is over its shards, and
the sum over ranks is the Gram matrix of the averaged gradients: a few numbers in one all-reduce, which also averages
the losses.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..ranks import Ranks
from ..sources import Lag, Overlap, Probe
from ..sources.source import Source
from ..sources.wrapper import innermost
from ..watch import Watch


class Shards(Ranks):
    """Ranks with a shard of every parameter each, on one device mesh: FSDP, or with a second dimension HSDP.

    Raises:
        ValueError: parameters that are not all sharded alike over one mesh dimension.
    """

    shards = True

    def __init__(self, params: Sequence[Tensor], op: str) -> None:
        layouts = set()
        for p in params:
            if not isinstance(p, DTensor):
                raise ValueError(
                    f"{op}: some parameters are sharded, but one of shape {tuple(p.shape)} is not, so nobody averages "
                    "its gradient; call fully_shard on its module too, before the optimizer is made"
                )
            layouts.add((p.device_mesh, tuple(type(placement) for placement in p.placements)))
        if len(layouts) > 1:
            raise ValueError(f"{op}: parameters lie on {len(layouts)} meshes or in several layouts; shard them alike")
        mesh, kinds = layouts.pop()
        if list(kinds).count(Shard) != 1 or any(kind not in (Shard, Replicate) for kind in kinds):
            names = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"{op}: parameters are laid out as ({names}); sharding over one mesh dimension is supported, alone or "
                "with replicas over others"
            )
        super().__init__(mesh.get_group(kinds.index(Shard)), op)
        self._replicas = [mesh.get_group(d) for d, kind in enumerate(kinds) if kind is Replicate]
        self.size = mesh.size()
        known = {id(p) for p in params}
        modules = [m for m in gc.get_objects() if issubclass(type(m), FSDPModule)]
        self._modules = [m for m in modules if any(id(p) in known for p in m.parameters())]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Nothing to do: FSDP has no place for K sets of unreduced gradients, so each part of a batch is reduced."""
        yield

    def check(self, source: Source, op: str) -> None:
        """Refuse sources that look at gradients before FSDP has reduced them.

        Raises:
            ValueError: it is one.
        """
        source = innermost(source)
        if isinstance(source, (Overlap, Lag, Probe)):
            raise ValueError(
                f"{op}: gram={source!r} looks at gradients before FSDP has reduced them over the ranks; use "
                "gram='exact', sources.Feature(), or Every or Ema of these"
            )

    @contextmanager
    def passing(
        self, i: int, K: int, params: Sequence[Tensor], row: Sequence[Tensor | None], watch: Watch | None
    ) -> Iterator[None]:
        """FSDP reduces by itself; unless it was told not to, when it would add up the gradients of all objectives."""
        for module in self._modules:
            state = module._get_fsdp_state()
            if any(not group.reduce_grads for group in getattr(state, "_fsdp_param_groups", ())):
                raise RuntimeError(
                    f"{self.op}: set_requires_gradient_sync(False) makes FSDP add up the unreduced gradients of all "
                    "objectives; leave it True, each part of an accumulated batch is reduced"
                )
        yield

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the whole mesh, in place."""
        return self.sum_replicas(super().sum(tensor))

    def sum_replicas(self, tensor: Tensor) -> Tensor:
        """Over the mesh's other dimensions."""
        for group in self._replicas:
            dist.all_reduce(tensor, group=group)
        return tensor

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts, which share memory with the whole."""
        return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]

    def local_rows(
        self, params: list[Tensor], states: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """This rank's parts of parameters and state."""
        local = [dict(zip(state, self.local(list(state.values())), strict=True)) for state in states]
        return self.local(params), local
