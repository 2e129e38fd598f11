"""FSDP2 (`fully_shard`): every rank holds a shard of each parameter, gradient and moment, as DTensors.

FSDP's own hooks reduce-scatter the gradients of each backward pass. So a rank's Gram matrix is over its shards, and
the sum over ranks is the Gram matrix of the averaged gradients: a few numbers in one all-reduce, which also averages
the losses.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.utils.weak import WeakIdKeyDictionary

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
        mesh, kinds = _layout_of(params, op)
        if list(kinds).count(Shard) != 1 or any(kind not in (Shard, Replicate) for kind in kinds):
            names = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"{op}: parameters are laid out as ({names}); sharding over one mesh dimension is supported, alone or "
                "with replicas over others"
            )
        super().__init__(mesh.get_group(kinds.index(Shard)), op)
        self._replicas = [mesh.get_group(d) for d, kind in enumerate(kinds) if kind is Replicate]
        self.size = mesh.size()
        self._layout = mesh, kinds
        self._modules = _modules_of(params)

    def adopt(self, params: Sequence[Tensor]) -> None:
        """Parameters of a group that comes later: sharded as the others are."""
        if _layout_of(params, self.op) != self._layout:
            raise ValueError(f"{self.op}: parameters lie on 2 meshes or in several layouts; shard them alike")
        self._modules += _modules_of(params)

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
        for module in filter(None, (held() for held in self._modules)):
            if any(not group.reduce_grads for group in _groups(module)):
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


def _layout_of(params: Sequence[Tensor], op: str) -> tuple[DeviceMesh, tuple[type[Placement], ...]]:
    """The one mesh and the kinds of placements of all parameters.

    Raises:
        ValueError: some are not sharded, or they are sharded in several ways.
    """
    layouts = set()
    for p in params:
        if not isinstance(p, DTensor):
            raise ValueError(
                f"{op}: some parameters are sharded, but one of shape {tuple(p.shape)} is not, so nobody averages "
                "its gradient; call fully_shard on its module too, before the optimizer has its parameters"
            )
        layouts.add((p.device_mesh, tuple(type(placement) for placement in p.placements)))
    if len(layouts) > 1:
        raise ValueError(f"{op}: parameters lie on {len(layouts)} meshes or in several layouts; shard them alike")
    return layouts.pop()


def _modules_of(params: Sequence[Tensor]) -> list[weakref.ref[FSDPModule]]:
    """The modules whose parameters these are; weakly: what the parameters remember must not keep them alive."""
    known = {id(p) for p in params}
    return [weakref.ref(m) for m in _modules() if any(id(p) in known for p, _ in _pairs(m))]


def shard_of_whole() -> WeakIdKeyDictionary:
    """From each whole parameter, which a model has between a forward pass and its backward pass, to its DTensor."""
    found = WeakIdKeyDictionary()
    for module in _modules():
        for p, whole in _pairs(module):
            if whole is not None:
                found[whole] = weakref.ref(p)
    return found


def _modules() -> list[FSDPModule]:
    return [m for m in gc.get_objects() if issubclass(type(m), FSDPModule)]


def _groups(module: FSDPModule) -> list[Any]:
    """What a module shards at once; torch before 2.14 has one group at most."""
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _pairs(module: FSDPModule) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A module's own sharded parameters, each with the whole one once that was there."""
    for group in _groups(module):
        for held in group.fsdp_params:
            yield held.sharded_param, getattr(held, "_unsharded_param", None)
