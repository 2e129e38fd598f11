"""What each rank does in the tests of FSDP2; `size` 1 is the one process to compare with."""

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from .ddp import SAMPLES, Student, _batches, _error, optimizer_of


def _make(size, options):
    torch.manual_seed(3)
    student = Student().to(options.get("dtype", torch.float64))
    if size > 1:
        copies = options.get("replicas", 1)
        names = ("replicate", "shard") if copies > 1 else ("shard",)
        mesh = init_device_mesh("cpu", (copies, size // copies) if copies > 1 else (size,), mesh_dim_names=names)
        keep = {"reshard_after_forward": options.get("reshard", True), "mesh": mesh}
        if options.get("blocks", True):
            for block in (student.trunk, student.head, student.projector):
                fully_shard(block, **keep)
        fully_shard(student, **keep)
    momentum = {"momentum": 0.9} if options.get("rule") == "sgd" else {}
    return student, optimizer_of(student, options, **momentum)


def _step(rank, size, student, optimizer, batch, parts=1, spoil=False):
    share = SAMPLES // (size * parts)
    for part in range(parts):
        begin = (part * size + rank) * share
        x, y, t = (b[begin : begin + share].to(next(student.parameters()).dtype) for b in batch)
        out, projected, z = student(x)
        task = (out - y).square().mean() * (float("nan") if spoil else 1.0)
        optimizer.backward({"task": task, "distill": (projected - t).square().mean()}, features=[z])
    optimizer.step()
    optimizer.zero_grad()


def _whole(tensor):
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach().clone()


def train(rank, size, options, steps=4):
    """Steps on this rank's samples; the whole weights, the balances' weights and the whole state."""
    student, optimizer = _make(size, options)
    weights = []
    for batch in _batches(steps):
        _step(rank, size, student, optimizer, batch, options.get("parts", 1))
        weights.append(optimizer.balance.weights.clone())
    params = list(student.parameters())
    return [_whole(p) for p in params], weights, [_whole(t) for p in params for t in optimizer.state[p].values()]


def nan_on_one(rank, size, options):
    student, optimizer = _make(size, options)
    first, second = _batches(2)
    _step(rank, size, student, optimizer, first)
    before = [_whole(p) for p in student.parameters()]
    _step(rank, size, student, optimizer, second, spoil=rank == 1)
    same = all(torch.equal(a, _whole(b)) for a, b in zip(before, student.parameters(), strict=True))
    return same, int(optimizer.skipped_steps)


def save(rank, size, options, folder):
    """Two steps, a checkpoint, and two steps more."""
    student, optimizer = _make(size, options)
    batches = _batches(4)
    for batch in batches[:2]:
        _step(rank, size, student, optimizer, batch)
    model_state, optimizer_state = get_state_dict(student, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    for batch in batches[2:]:
        _step(rank, size, student, optimizer, batch)
    return [_whole(p) for p in student.parameters()]


def load(rank, size, options, folder):
    """The two steps that follow the checkpoint, on another number of ranks."""
    student, optimizer = _make(size, options)
    model_state, optimizer_state = get_state_dict(student, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    # a layer that no objective reached has no state there
    dcp.load(state, checkpoint_id=folder, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    set_state_dict(student, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for batch in _batches(4)[2:]:
        _step(rank, size, student, optimizer, batch)
    return [_whole(p) for p in student.parameters()]


def refused(rank, size, source):
    student, optimizer = _make(size, {"source": source})
    return _error(ValueError, _step, rank, size, student, optimizer, _batches(1)[0])


def unsynced(rank, size):
    student, optimizer = _make(size, {})
    student.set_requires_gradient_sync(False)
    return _error(RuntimeError, _step, rank, size, student, optimizer, _batches(1)[0])


def late_group(rank, size):
    """A parameter that is not sharded, in a group that comes after a step."""
    student, optimizer = _make(size, {})
    _step(rank, size, student, optimizer, _batches(1)[0])
    groups = len(optimizer.param_groups)
    late = {"params": [nn.Parameter(torch.ones(3, dtype=torch.float64))]}
    message = _error(ValueError, optimizer.add_param_group, late)
    return message, len(optimizer.param_groups) - groups


def state_numbers(rank, size):
    """How many numbers this rank's moments and parameters hold."""
    student, optimizer = _make(size, {})
    _step(rank, size, student, optimizer, _batches(1)[0])
    params = [p for group in optimizer.param_groups for p in group["params"] if p in optimizer.state]
    assert all(isinstance(optimizer.state[p]["exp_avg"], DTensor) for p in params)
    held = sum(optimizer.state[p]["exp_avg"].to_local().numel() for p in params)
    return held, sum(p.numel() for p in params), max(p.numel() // p.shape[0] for p in params) * len(params)
