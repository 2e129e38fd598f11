"""Whether other ranks train the same parameters, found out from the parameters themselves."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from ..ranks import Ranks
from ..sources.source import Source


def find(params: Sequence[Tensor], source: Source, op: str) -> Ranks | None:
    """The ranks of an optimizer that was not attached, from its parameters; called once, by the first `backward`.

    Raises:
        RuntimeError: the parameters belong to a DistributedDataParallel module of several ranks.
        ValueError: sharded parameters in a layout, or with a source of the Gram matrix, that is not supported.
    """
    if any(isinstance(p, DTensor) for p in params):
        from .shards import Shards

        ranks = Shards(params, op)
        ranks.check(source, op)
        return ranks
    if _wrapped(params):
        raise RuntimeError(
            f"{op}: parameters of the optimizer belong to a DistributedDataParallel module, which reduces the "
            "gradients of one backward pass only, so the ranks would drift apart; call "
            "dtokd_kernels.distributed.attach(optimizer, module) after both are made"
        )
    return None


def refuse_wrapped(params: Sequence[Tensor], op: str) -> None:
    """What cannot be attached must not meet a wrapped module.

    Raises:
        RuntimeError: the parameters belong to a DistributedDataParallel module of several ranks.
    """
    if not params or params[0] in _unwrapped:
        return
    if any(isinstance(p, DTensor) for p in params):
        raise RuntimeError(f"{op}: params are sharded, so a rank sees a part of each gradient; use DTOAdamW or DTOSGD")
    if _wrapped(params):
        raise RuntimeError(
            f"{op}: params belong to a DistributedDataParallel module, which reduces the gradients of one backward "
            "pass only, so the ranks would drift apart; use DTOAdamW or DTOSGD with "
            "dtokd_kernels.distributed.attach(optimizer, module)"
        )
    _unwrapped[params[0]] = True


#: First parameters of lists that were looked up: the search takes tens of milliseconds.
_unwrapped = WeakIdKeyDictionary()


def _wrapped(params: Sequence[Tensor]) -> bool:
    """Whether one of them belongs to a DistributedDataParallel module of several ranks."""
    known = {id(p) for p in params}
    return any(
        issubclass(type(item), DistributedDataParallel)
        and dist.get_world_size(item.process_group) > 1
        and any(id(p) in known for p in item.module.parameters())
        for item in gc.get_objects()  # a module's hooks cannot be seen from its parameters
    )
