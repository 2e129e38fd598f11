"""Whether other ranks train the same parameters, found out from the parameters themselves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from ..ranks import Ranks
from ..sources.source import Source
from .connect import check_complete, connect, group_of
from .replicas import Replicas, outside
from .shards import Shards, shard_of_whole


@dataclass(frozen=True)
class _Found:
    """Who trains the parameters of calls of `backward` for other optimizers.

    Attributes:
        known: the ids of the parameters.
        ranks: returns the ranks; None if there are none.
    """

    known: frozenset[int]
    ranks: Callable[[], Ranks | None]


#: What was found, by each of the parameters.
_found = WeakIdKeyDictionary()
#: Of models that are sharded by FSDP2: from whole parameters to weak references to their shards.
_shards = WeakIdKeyDictionary()


def find(params: Sequence[Tensor], source: Source, op: str) -> Ranks | None:
    """The ranks of an optimizer that was not attached, from its parameters; called once, by the first `backward`.

    Raises:
        RuntimeError: the parameters belong to a DistributedDataParallel module of several ranks.
        ValueError: sharded parameters in a layout, or with a source of the Gram matrix, that is not supported.
    """
    if any(isinstance(p, DTensor) for p in params):
        ranks = Shards(params, op)
        ranks.check(source, op)
        return ranks
    if any(dist.get_world_size(module.process_group) > 1 for module in _modules_of(params)):
        raise RuntimeError(
            f"{op}: parameters of the optimizer belong to a DistributedDataParallel module, which reduces the "
            "gradients of one backward pass only, so the ranks would drift apart; call "
            "dtokd_kernels.distributed.attach(optimizer, module) after both are made"
        )
    return None


def of_backward(params: Sequence[Tensor], source: Source, op: str) -> tuple[Sequence[Tensor], Ranks | None]:
    """The ranks that train the parameters of a call of `backward` for other optimizers.

    They are those that `attach` was given for the parameters; else they are found, in the first call with these
    parameters: `Shards` of an FSDP2 model, or the ranks of the DistributedDataParallel modules that have the
    parameters, whose reduction is taken over then. All ranks make that call.

    Args:
        params: of the call; they require a gradient.
        source: of the Gram matrix.
        op: what error messages call this.

    Returns:
        The parameters, with shards in the place of the whole ones that FSDP2 shows before a backward pass; the ranks,
        None if there are none.

    Raises:
        ValueError: sharded parameters in a layout, or with a source of the Gram matrix, that is not supported; a
            parameter of a wrapped module that is not in `params`, or one in `params` beside those of the modules.
    """
    if not params:
        return params, None
    params = _as_shards(params)
    found: _Found | None = _found.get(params[0])
    if found is None or not found.known.issuperset(map(id, params)):  # the search takes milliseconds
        _shards.update(shard_of_whole())
        params = _as_shards(params)
        found = _look(params, op)
    ranks = found.ranks()
    if isinstance(ranks, Shards):
        ranks.check(source, op)
    if isinstance(ranks, Replicas) and (p := ranks.missing(params)) is not None:
        raise ValueError(
            f"{op}: params lacks a parameter {tuple(p.shape)} that the ranks train together, so nobody would average "
            "its gradient; add it to params, or freeze it with requires_grad_(False)"
        )
    return params, ranks


def _as_shards(params: Sequence[Tensor]) -> Sequence[Tensor]:
    if not _shards:
        return params
    shards = [_shards[p]() if p in _shards else None for p in params]
    return [p if shard is None else shard for p, shard in zip(params, shards, strict=True)]


def remember(params: Sequence[Tensor], ranks: Replicas) -> None:
    """Have `of_backward` find these ranks; others that had the parameters let go of them."""
    for old in _replicas_of(params):
        if old is not ranks:
            old.unhook()
    # weakly, as the ranks hold the parameters; the parameters' hooks keep the ranks
    _note(params, weakref.ref(ranks))


def _note(params: Sequence[Tensor], ranks: Callable[[], Ranks | None]) -> _Found:
    found = _Found(frozenset(map(id, params)), ranks)
    for p in params:
        _found[p] = found
    return found


def _replicas_of(params: Sequence[Tensor]) -> list[Replicas]:
    """The ranks that have one of the parameters."""
    held = [_found[p].ranks() for p in params if p in _found]
    return list({id(ranks): ranks for ranks in held if isinstance(ranks, Replicas)}.values())


def _look(params: Sequence[Tensor], op: str) -> _Found:
    """Find out and note who trains the parameters.

    Raises:
        ValueError: as `of_backward`.
    """
    if any(isinstance(p, DTensor) for p in params):
        shards = Shards(params, op)
        return _note(params, lambda: shards)
    before = _replicas_of(params)
    modules = [m for ranks in before for m in ranks.modules] if before else _modules_of(params)
    if not before and not modules:
        return _note(params, lambda: None)
    check_complete(params, modules, op, "params")
    attached = {i for ranks in before for i in ranks.hooked}
    others = [p for p in outside(params, modules) if id(p) not in attached]
    if others or len(before) > 1:
        shape = tuple((others or params)[0].shape)
        raise ValueError(
            f"{op}: params has a parameter {shape} beside those that the ranks train together, so it may be another "
            "one on each rank; call dtokd_kernels.distributed.attach(params, module) with all of them before the "
            "first step"
        )
    if before:
        ranks = before[0]
        ranks.hook(params)
    else:
        static = any(module.static_graph for module in modules)
        ranks = Replicas(group_of(modules, op), modules, op=op, static_graph=static, each_part=True)
        connect(ranks, params, modules)
    remember(params, ranks)
    return _found[params[0]]


def _modules_of(params: Sequence[Tensor]) -> list[DistributedDataParallel]:
    """The DistributedDataParallel modules that have one of the parameters."""
    known = {id(p) for p in params}
    return [
        item
        for item in gc.get_objects()  # a module's hooks cannot be seen from its parameters
        if issubclass(type(item), DistributedDataParallel) and any(id(p) in known for p in item.module.parameters())
    ]
