"""What each rank does in the tests of `dk.backward` with other optimizers; `size` 1 is the process to compare with."""

import contextlib
import gc
import weakref

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dtokd_kernels as dk

from .ddp import SAMPLES, SOURCES, WEIGHTINGS, Student, _batches, _error
from .fsdp import _whole


def _shard(student, size, copies=1):
    names = ("replicate", "shard") if copies > 1 else ("shard",)
    mesh = init_device_mesh("cpu", (copies, size // copies) if copies > 1 else (size,), mesh_dim_names=names)
    for block in (student.trunk, student.head, student.projector):
        fully_shard(block, mesh=mesh)
    return fully_shard(student, mesh=mesh)


def _optimizers(student, name):
    """One of torch's or timm's; Muon for matrices with AdamW for the rest, as torch has it, in two."""
    params = list(student.parameters())
    if name != "two":
        return [create_optimizer_v2(params, opt=name, lr=0.01, weight_decay=0.01)]
    matrices = [p for p in params if p.dim() == 2]
    rest = [p for p in params if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=0.01)]


def train(rank, size, options, steps=3):
    """Steps on this rank's samples; the whole weights, the balances' weights and the whole `.grad` of each step."""
    torch.manual_seed(3)
    student = Student().double()
    way = options["way"]
    model, sync_off = student, contextlib.nullcontext
    if size > 1 and way in ("ddp", "attached"):
        model = DistributedDataParallel(student, find_unused_parameters=options.get("find_unused", False))
        sync_off = model.no_sync
    if size > 1 and way == "fsdp":
        _shard(student, size, options.get("replicas", 1))
    optimizers = _optimizers(student, options.get("opt", "adamw"))
    if size > 1 and way == "attached":
        target = student.parameters() if len(optimizers) > 1 else optimizers[0]
        dk.distributed.attach(target, model, bucket_bytes=600, static_graph=options.get("static", False))
    if size > 1 and way == "unwrapped":
        sync_off = dk.distributed.attach(optimizers[0], bucket_bytes=600).no_sync
    scaler = torch.amp.GradScaler("cpu", init_scale=1024, enabled=options.get("scaled", False))
    balance = {
        "weighting": WEIGHTINGS[options.get("weighting", "dto")](),
        "gram": SOURCES[options.get("source", "exact")](student),
        "max_norm": options.get("max_norm"),
        "private": options.get("private", "own"),
    }
    weights, grads = [], []
    parts = options.get("parts", 1)
    share = SAMPLES // (size * parts)
    for batch in _batches(steps):
        for part in range(parts):
            begin = (part * size + rank) * share  # so that one process sees the same parts
            x, y, t = (b[begin : begin + share] for b in batch)
            with sync_off() if part < parts - 1 else contextlib.nullcontext():
                out, projected, z = model(x)
                losses = {"task": (out - y).square().mean(), "distill": (projected - t).square().mean()}
                record = dk.backward(
                    losses, student.parameters(), **balance, share=1 / parts, scaler=scaler, features=[z]
                )
                weights.append(record.weights.clone())
        grads += [_whole(p.grad) for p in student.parameters() if p.grad is not None]
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=options.get("to_none", True))
    return [_whole(p) for p in student.parameters()], weights, grads


def spoiled(rank, size, way, what):
    """Rank 1 has an infinite loss whose gradient is finite, or NaN; what `.grad` is on each rank, and the scale."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    called = DistributedDataParallel(model) if way == "ddp" else model
    if way == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024, enabled=what == "scaled")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [_whole(p) for p in model.parameters()]
    out = called(torch.ones(3, 4, dtype=torch.float64))
    losses = {"task": out.square().mean(), "distill": (out - 1).square().mean()}
    if rank == 1:
        losses["task"] = losses["task"] + float("inf") if what == "scaled" else losses["task"] * float("nan")
    skipped = bool(dk.backward(losses, model.parameters(), scaler=scaler).skipped)
    empty = all(p.grad is None for p in model.parameters())
    scaler.step(optimizer)
    scaler.update()
    same = all(torch.equal(a, _whole(p)) for a, p in zip(before, model.parameters(), strict=True))
    return skipped, empty, same, scaler.get_scale()


def refusals(rank, size):
    """Parameters that nobody would average, and other ways to let the ranks drift apart."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    loose = nn.Parameter(torch.ones(7, dtype=torch.float64))
    wrapped = DistributedDataParallel(model)
    params = list(model.parameters())

    def losses():
        out = wrapped(torch.ones(3, 4, dtype=torch.float64))
        return {"task": out.square().mean() + loose.sum(), "distill": (out - 1).square().mean()}

    found = [_error(ValueError, dk.backward, losses(), params[:2])]
    found.append(_error(ValueError, dk.backward, losses(), [*params, loose]))
    found.append(_error(ValueError, lambda: dk.distributed.attach(params, wrapped, shard=True)))
    dk.backward(losses(), params)
    found.append(_error(ValueError, dk.backward, losses(), params[1:]))
    found.append(_error(ValueError, dk.backward, losses(), [*params, loose]))
    found.append(_error(RuntimeError, losses()["task"].backward))
    return found


def let_go(rank, size):
    """Whether a model lives on in what was found for it, although attached again and with a layer unfrozen."""
    gone = []
    for way in ("ddp", "fsdp"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        model[2].bias.requires_grad_(False)
        wrapped = (
            DistributedDataParallel(model)
            if way == "ddp"
            else fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
        )
        for step in range(3):
            if way == "ddp" and step == 2:
                dk.distributed.attach(model.parameters(), wrapped)
            model[2].bias.requires_grad_(step > 0)
            out = wrapped(torch.full((3, 4), float(rank), dtype=torch.float64))
            dk.backward([out.square().mean(), (out - 1).square().mean()], model.parameters())
        assert model[2].bias.grad is not None
        same = _whole(model[2].bias.grad)
        gone.append(weakref.ref(model))
        del model, wrapped, out
    gc.collect()
    return [ref() is None for ref in gone], same
