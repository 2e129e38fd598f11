"""Connecting an optimizer with the other ranks that train its parameters."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..balanced import Balanced
from ..checks import check_flag, is_number
from .replicas import BUCKET_BYTES, Replicas


def attach(
    optimizer: Balanced,
    *modules: DistributedDataParallel,
    process_group: dist.ProcessGroup | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    static_graph: bool = False,
    shard: bool = False,
) -> Replicas:
    """Let an optimizer average its gradient sets over the ranks of a process group; call it on all of them.

    From then on `optimizer.backward` reduces the gradients of each objective in buckets, while the pass that makes
    them goes on, and `step` does the same on all ranks. The modules' own reduction, which knows only the first
    backward pass of a forward, is switched off for good; they still broadcast their buffers. Parameters of the
    optimizer that belong to none of the modules (a projector, a plain module) are averaged as well, and are given rank
    0's values here, as `DistributedDataParallel` does with its own.

    Args:
        optimizer: `DTOAdamW` or `DTOSGD`.
        modules: the models that are wrapped in `DistributedDataParallel`. Their `no_sync()` holds here too.
        process_group: default: that of the modules, or torch's default.
        bucket_bytes: gradients that are reduced in one all-reduce.
        static_graph: the parameters that an objective reaches are the same in all steps and on all ranks. Then those
            that it does not reach are not sent, and on CUDA, after the first step, `backward` does not wait to learn
            which were reached; it does once a pass otherwise.
        shard: each rank keeps a share of the gradient sets and of the optimizer's state only, updates its share of the
            parameters and gathers the rest (ZeRO-2); see `Sharded`. Not after steps were taken or a state was loaded.

    Returns:
        The ranks, whose `no_sync()` is for models without a wrapper.

    Raises:
        TypeError: something else than an optimizer of this package or a wrapped module.
        ValueError: a module's parameter that requires a gradient is not in the optimizer: nobody would average it.
        RuntimeError: torch.distributed is not initialized.
    """
    if not isinstance(optimizer, Balanced):
        raise TypeError(f"attach: optimizer is a {type(optimizer).__name__}; pass a DTOAdamW or DTOSGD")
    for module in modules:
        if not isinstance(module, DistributedDataParallel):
            raise TypeError(
                f"attach: got a {type(module).__name__} beside the optimizer; pass modules that are wrapped in "
                "DistributedDataParallel (parameters of plain ones are averaged as well)"
            )
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("attach: torch.distributed is not initialized; call init_process_group first")
    if not is_number(bucket_bytes) or bucket_bytes < 1:
        raise ValueError(f"attach: bucket_bytes is {bucket_bytes!r}; pass a positive number, such as {BUCKET_BYTES}")
    check_flag("attach: static_graph", static_graph)
    check_flag("attach: shard", shard)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if any(isinstance(p, DTensor) for p in params):
        raise ValueError("attach: the optimizer's parameters are sharded; it finds that out by itself, without attach")
    known = {id(p) for p in params}
    for module in modules:
        for name, p in module.module.named_parameters():
            if p.requires_grad and id(p) not in known and name not in module.parameters_to_ignore:
                raise ValueError(
                    f"attach: the module's parameter {name!r} is not in the optimizer, so nobody would average its "
                    "gradient; add it to a parameter group, or freeze it with requires_grad_(False)"
                )
    wrapped = {id(p) for module in modules for p in module.module.parameters()}
    groups = {id(m.process_group): m.process_group for m in modules}
    if process_group is None and groups:
        if len(groups) > 1:
            raise ValueError("attach: the modules have different process groups; attach an optimizer to each")
        process_group = next(iter(groups.values()))
    static_graph = static_graph or any(m.static_graph for m in modules)
    op = f"{type(optimizer).__name__}.backward"
    if shard:
        from .sharded import Sharded

        for p in params:
            if not p.is_contiguous():
                raise ValueError(
                    f"attach: shard=True cuts parameters into parts, but one {tuple(p.shape)} is not contiguous "
                    "(channels_last?); use model.to(memory_format=torch.contiguous_format), or shard=False"
                )
        if optimizer.state:
            raise ValueError("attach: shard=True, but the optimizer has a state already; attach it before")
        sharded = Sharded(
            process_group,
            modules,
            op=op,
            device=params[0].device.type,
            bucket_bytes=bucket_bytes,
            static_graph=static_graph,
        )
        sharded.check(optimizer._source, "attach")
        ranks: Replicas = sharded
    else:
        ranks = Replicas(process_group, modules, op=op, bucket_bytes=bucket_bytes, static_graph=static_graph)
    for p in params:
        if id(p) not in wrapped:
            dist.broadcast(p.detach(), group_src=0, group=process_group)
    ranks.hook(params)
    for module in modules:
        module._remove_autograd_hooks()
        module._static_graph_delay_allreduce_enqueued = True  # else a static graph's first pass reduces on its own
    optimizer._ranks = ranks
    return ranks
