"""A trainer that knows one loss: DistributedDataParallel or FSDP2 average its gradient; `size` 1 is one process."""

import contextlib

import torch
from dtokd.audiocraft import Balancer
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dtokd_kernels as dk
from dtokd_kernels.sources import Every, Feature, Probe

from .ddp import SAMPLES, Student, _batches

RULES = {
    "probe": lambda student: {"gram": Probe(student.trunk[2])},
    "feature": lambda student: {"gram": Feature()},
    "every": lambda student: {"gram": Every(2, Feature())},
    "amortized": lambda student: {"weighting": dk.weighting.Amortized()},
}


def train(rank, size, rule, how, parts=2, steps=3):
    """Accumulated steps on this rank's samples; returns the parameters and the balances' weights."""
    torch.manual_seed(3)
    student = Student().double()
    student.unused = None  # FSDP2 would average nothing for it, and DDP wait
    balanced = dk.BalancedLoss(**RULES[rule](student))
    model = student
    if size > 1:
        model = fully_shard(student) if how == "fsdp" else DistributedDataParallel(student)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    weights = []
    for batch in _batches(steps):
        share = SAMPLES // (size * parts)
        for part in range(parts):
            begin = (part * size + rank) * share  # so that one process sees the same parts
            x, y, t = (b[begin : begin + share] for b in batch)
            waits = how == "ddp" and size > 1 and part < parts - 1
            with model.no_sync() if waits else contextlib.nullcontext():
                out, projected, z = model(x)
                losses = {"task": (out - y).square().mean(), "distill": (projected - t).square().mean()}
                (balanced(losses, features=z) / parts).backward()
            weights.append(balanced.balance.weights)
        optimizer.step()
        optimizer.zero_grad()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach() for p in whole], weights


def audiocraft(rank, size):
    """The averages of audiocraft's balancer after two steps, of ranks with 3 and 5 items."""
    balancer = Balancer({"task": 1.0, "distill": 3.0}, ema_decay=0.5)
    for x, y, t in _batches(2):
        part = slice(0, 8) if size == 1 else (slice(0, 3), slice(3, 8))[rank]
        out = x[part, :3].clone().requires_grad_()
        balancer.backward({"task": (out - y[part]).square().sum(), "distill": (out - t[part, :3]).abs().sum()}, out)
    return list(balancer.state_dict().values())


def refused_by_one(rank, size):
    """The messages of the errors that the ranks raise, where one has a bad loss."""
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    balanced = dk.BalancedLoss(dk.weighting.Amortized())
    try:
        balanced([w.sum(), w.detach().sum() if rank == 0 else w.square().sum()])
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""
