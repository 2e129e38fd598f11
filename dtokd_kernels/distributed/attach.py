"""Connecting an optimizer with the other ranks that train its parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..balanced import Balanced
from ..checks import check_flag, check_params, is_number
from ..ranks import initialized
from .connect import check_complete, connect, group_of
from .find import remember
from .replicas import BUCKET_BYTES, Replicas


def attach(
    optimizer: torch.optim.Optimizer | Iterable[Tensor],
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

    With another optimizer than those of this package, or with parameters alone, `dtokd_kernels.backward(losses,
    params)` does the same. It finds wrapped modules by itself; only for the options below, and for parameters outside
    of the modules, it needs this call.

    Args:
        optimizer: `DTOAdamW` or `DTOSGD`; or, for `dtokd_kernels.backward`, any other optimizer or the parameters, such
            as `model.parameters()`.
        modules: the models that are wrapped in `DistributedDataParallel`. Their `no_sync()` holds here too, but not for
            `dtokd_kernels.backward`, which weighs, and so reduces, each part of a batch.
        process_group: default: that of the modules, or torch's default.
        bucket_bytes: gradients that are reduced in one all-reduce.
        static_graph: the parameters that an objective reaches are the same in all steps and on all ranks. Then those
            that it does not reach are not sent, and on CUDA, after the first step, `backward` does not wait to learn
            which were reached; it does once a pass otherwise.
        shard: each rank keeps a share of the gradient sets and of the optimizer's state only, updates its share of the
            parameters and gathers the rest (ZeRO-2); see `Sharded`. Not after steps were taken or a state was loaded;
            `DTOAdamW` and `DTOSGD` only.

    Returns:
        The ranks, whose `no_sync()` is for models without a wrapper.

    Raises:
        TypeError: something else than an optimizer, parameters, or a wrapped module.
        ValueError: a module's parameter that requires a gradient is not in the optimizer: nobody would average it.
        RuntimeError: torch.distributed is not initialized.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        holder = "the optimizer"
    else:
        params, holder = check_params("attach", optimizer), "params"
    for module in modules:
        if not isinstance(module, DistributedDataParallel):
            raise TypeError(
                f"attach: got a {type(module).__name__} beside the optimizer; pass modules that are wrapped in "
                "DistributedDataParallel (parameters of plain ones are averaged as well)"
            )
    if not initialized():
        raise RuntimeError("attach: torch.distributed is not initialized; call init_process_group first")
    if not is_number(bucket_bytes) or bucket_bytes < 1:
        raise ValueError(f"attach: bucket_bytes is {bucket_bytes!r}; pass a positive number, such as {BUCKET_BYTES}")
    check_flag("attach: static_graph", static_graph)
    check_flag("attach: shard", shard)
    if any(isinstance(p, DTensor) for p in params):
        raise ValueError("attach: the parameters are sharded, which the first backward finds out; leave attach out")
    check_complete(params, modules, "attach", holder)
    if process_group is None:
        process_group = group_of(modules, "attach")
    static_graph = static_graph or any(m.static_graph for m in modules)
    balanced = isinstance(optimizer, Balanced)
    op = f"{type(optimizer).__name__}.backward" if balanced else "backward"
    if shard:
        if not isinstance(optimizer, Balanced):
            raise ValueError(
                f"attach: shard=True divides the state of DTOAdamW and DTOSGD, this is a {type(optimizer).__name__}; "
                "leave it out, or shard the model with FSDP2"
            )
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
        ranks = Replicas(
            process_group,
            modules,
            op=op,
            bucket_bytes=bucket_bytes,
            static_graph=static_graph,
            each_part=not balanced,
        )
    connect(ranks, params, modules)
    if isinstance(optimizer, Balanced):
        optimizer._ranks = ranks
    else:
        remember(params, ranks)
    return ranks
