"""Taking over the reduction of gradients from DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .replicas import Replicas


def check_complete(params: Sequence[Tensor], modules: Sequence[DistributedDataParallel], op: str, holder: str) -> None:
    """Refuse modules that train a parameter which is not among these.

    Args:
        params: whose gradients are averaged.
        modules: the models that are wrapped.
        op: what error messages call this.
        holder: what has the parameters, in error messages, and `add` to it.

    Raises:
        ValueError: names the parameter.
    """
    known = set(map(id, params))
    for module in modules:
        for name, p in module.module.named_parameters():
            if p.requires_grad and id(p) not in known and name not in module.parameters_to_ignore:
                raise ValueError(
                    f"{op}: the module's parameter {name!r} is not in {holder}, so nobody would average its gradient; "
                    f"add it to {holder}, or freeze it with requires_grad_(False)"
                )


def group_of(modules: Sequence[DistributedDataParallel], op: str) -> dist.ProcessGroup | None:
    """The process group of the modules; None without modules.

    Raises:
        ValueError: they have several.
    """
    groups = {id(m.process_group): m.process_group for m in modules}
    if len(groups) > 1:
        raise ValueError(f"{op}: the modules have different process groups; attach an optimizer to each")
    return next(iter(groups.values()), None)


def connect(ranks: Replicas, params: Sequence[Tensor], modules: Sequence[DistributedDataParallel]) -> None:
    """From here on `ranks` reduces the gradients, and the modules do not. All ranks call it.

    Effects: parameters outside of the modules become those of rank 0, as the modules have done with their own.
    """
    ranks.adopt(params)
    for module in modules:
        module._remove_autograd_hooks()
        module._static_graph_delay_allreduce_enqueued = True  # else a static graph's first pass reduces on its own
