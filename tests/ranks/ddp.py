"""What each rank does in the tests of DistributedDataParallel; `size` 1 is the one process to compare with."""

import contextlib
import unittest.mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dtokd_kernels as dk
from dtokd_kernels import sources, weighting

from ..oracle import NoGradient

SAMPLES = 12


class Student(nn.Module):
    """A trunk, a head that only the task reaches, a projector that only distillation reaches, and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.projector, self.head, self.unused = nn.Linear(8, 5), nn.Linear(8, 3), nn.Linear(2, 2)

    def forward(self, x):
        z = self.trunk(x)
        return self.head(z), self.projector(z), z


SOURCES = {
    "exact": lambda student: "exact",
    "overlap": lambda student: "overlap",
    "lag": lambda student: "lag",
    "probe": lambda student: sources.Probe(student.trunk[2]),
    "found": lambda student: sources.Probe(),
    "feature": lambda student: sources.Feature(),
    "every": lambda student: sources.Every(2),
    "ema": lambda student: sources.Ema(0.5),
    "none": lambda student: None,
}
WEIGHTINGS = {"dto": weighting.DTO, "amortized": weighting.Amortized, "rlw": weighting.RLW, "pcgrad": weighting.PCGrad}


def _batches(steps):
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(SAMPLES, n, dtype=torch.float64, generator=generator) for n in (6, 3, 5)] for _ in range(steps)
    ]


def whole(t, p):
    """A state tensor in the parameter's shape."""
    return t.full_tensor().view(-1)[: p.numel()].view(p.shape) if isinstance(t, DTensor) else t


def optimizer_of(student, options, **more):
    """What all cases share."""
    groups = [
        {"params": [*student.trunk.parameters(), *student.projector.parameters(), *student.unused.parameters()]},
        {"params": list(student.head.parameters()), "balance": options.get("balance_head", True), "lr": 0.02},
    ]
    return {"adamw": dk.DTOAdamW, "sgd": dk.DTOSGD}[options.get("rule", "adamw")](
        groups,
        lr=0.01,
        weighting=WEIGHTINGS[options.get("weighting", "dto")](),
        gram=SOURCES[options.get("source", "exact")](student),
        max_norm=options.get("max_norm"),
        private=options.get("private", "own"),
        rescale=options.get("rescale", "none"),
        **options.get("precision", {}),
        **more,
    )


def train(rank, size, options, steps=4):
    """Steps on this rank's samples; returns the weights and the balances' weights."""
    torch.manual_seed(3)
    dtype = options.get("dtype", torch.float64)
    student = Student().to(dtype)
    if rank and options.get("other_start"):
        nn.init.ones_(student.head.weight)  # DDP and attach give all ranks what rank 0 has
    optimizer = optimizer_of(student, options, **({"momentum": 0.9} if "momentum" in options else {}))
    model, sync_off = student, contextlib.nullcontext
    if size > 1:
        bucket = options.get("bucket_bytes", 600)
        told = {"static_graph": options.get("static", False), "shard": options.get("shard", False)}
        if options.get("wrapped", True):
            model = DistributedDataParallel(student, find_unused_parameters=options.get("find_unused", False))
            dk.distributed.attach(optimizer, model, bucket_bytes=bucket, **told)
            sync_off = model.no_sync
        else:
            sync_off = dk.distributed.attach(optimizer, bucket_bytes=bucket, **told).no_sync
    weights = []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024, enabled="scaled" in options)
    for batch in _batches(steps):
        parts = options.get("parts", 1)
        share = SAMPLES // (size * parts)
        for part in range(parts):
            begin = (part * size + rank) * share  # so that one process sees the same parts
            x, y, t = (b[begin : begin + share].to(dtype) for b in batch)
            with sync_off() if part < parts - 1 else contextlib.nullcontext():
                out, projected, z = model(x)
                if options.get("sometimes") and size > 1 and rank == 0:
                    projected = projected.detach() + 0 * z.sum()  # only other ranks reach the projector
                task = (out - y).square().sum() / (share * 3)
                distill = (projected - t).square().sum() / (share * 5)
                if options.get("sometimes") and size == 1:
                    # the samples of what was rank 0 do not count for the projector
                    n = options["sometimes"]
                    kept = (projected[: SAMPLES // n].detach() + 0 * z.sum(), projected[SAMPLES // n :])
                    distill = (torch.cat(kept) - t).square().mean()
                if options.get("zeros") and size > 1:  # in place of None
                    nothing = 0 * sum(p.sum() for p in student.parameters())
                    task, distill = task + nothing, distill + nothing
                losses = {"task": task, "distill": distill}
                optimizer.backward(losses, share=1 / parts, features=[z], scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=options.get("to_none", True))
        weights.append(optimizer.balance.weights.clone())
    # with zeros, parameters that nothing reaches are decayed
    left_out = set(map(id, student.unused.parameters() if options.get("zeros") else ()))
    trained = [p for p in student.parameters() if id(p) not in left_out]
    state = [whole(t, p) for p in trained for t in optimizer.state[p].values()]
    return [p.detach() for p in trained], weights, state


def _linear(size, **options):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, dk.DTOAdamW(model.parameters(), lr=0.01, **options)


def _losses(model, scale=1.0):
    out = model(torch.ones(3, 4, dtype=torch.float64))
    return {"task": scale * out.square().mean(), "distill": (out - 1).square().mean()}


def _error(kind, function, *args):
    """The message of the error that a call must raise."""
    try:
        function(*args)
    except kind as error:
        return str(error)
    raise AssertionError(f"{function} raised no {kind.__name__}")


def not_attached(rank, size):
    """An optimizer of ours that is not told of the module."""
    model, optimizer = _linear(size)
    ddp = DistributedDataParallel(model)
    return _error(RuntimeError, optimizer.backward, _losses(ddp))


def changing_groups(rank, size, shard, source):
    """An empty parameter; then groups whose first parameter leaves and that take a smaller one and a larger one."""
    torch.manual_seed(3)
    sizes = {"first": 5, "empty": 0, "a": 7, "b": 3, "small": 1, "large": 40}
    params = {name: nn.Parameter(torch.randn(n, dtype=torch.float64)) for name, n in sizes.items()}
    early = ["first", "empty", "a", "b"]
    optimizer = dk.DTOSGD([params[name] for name in early], lr=0.1, momentum=0.9, gram=source)
    if size > 1:
        dk.distributed.attach(optimizer, bucket_bytes=64, shard=shard)

    def step(names, number):
        shift = (rank - (size - 1) / 2) / 10  # its mean over the ranks is 0
        task = sum((params[name] - 1).square().sum() + shift * params[name].sum() for name in names) + 50
        distill = sum((params[name] + number).square().sum() for name in names if name != "b") + 50
        optimizer.backward({"task": task, "distill": distill})
        optimizer.step()
        optimizer.zero_grad()
        return optimizer.balance.weights.clone()

    weights = [step(early, number) for number in range(2)]
    optimizer.param_groups[0]["params"][:] = [params[name] for name in ("small", "empty", "b", "a", "large")]
    late = ["small", "empty", "a", "b", "large"]
    weights += [step(late, number) for number in range(2)]
    weights.append(step(["first", *late], 3))  # a removed one gets gradients of its own
    return [p.detach() for p in params.values()], weights


def late_group(rank, size, shard):
    """A head that comes after the optimizer was attached, made with another seed on each rank."""
    torch.manual_seed(3)
    trunk = nn.Linear(4, 3, dtype=torch.float64)
    optimizer = dk.DTOAdamW(trunk.parameters(), lr=0.1)
    if size > 1:
        dk.distributed.attach(optimizer, shard=shard)
    torch.manual_seed(rank)
    head = nn.Linear(3, 2, dtype=torch.float64)
    optimizer.add_param_group({"params": list(head.parameters())})
    for _ in range(2):
        out = head(trunk(torch.ones(3, 4, dtype=torch.float64)))
        optimizer.backward({"task": out.square().mean(), "distill": (out - 1).square().mean()})
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in (*trunk.parameters(), *head.parameters())], []


def state_of_some_ranks(rank, size):
    """The last rank alone trains a model, with a sharded state; what it gets of that."""
    group = dist.new_group([size - 1])
    if rank != size - 1:
        return None
    model, optimizer = _linear(size)
    dk.distributed.attach(optimizer, process_group=group, shard=True)
    optimizer.backward(_losses(model))
    optimizer.step()
    return [sorted(state) for state in dk.distributed.whole_state(optimizer)["state"].values()]


def ranks_that_come_later(rank, size):
    """A first backward before torch.distributed is initialized, or a group of a wrapped module after it."""
    answers = []
    for late in (False, True):
        model, optimizer = _linear(size)
        with unittest.mock.patch("torch.distributed.is_initialized", lambda late=late: late):
            optimizer.backward(_losses(model))
        optimizer.zero_grad()
        if late:
            model = nn.Sequential(model, nn.Linear(2, 2, dtype=torch.float64))
            optimizer.add_param_group({"params": list(model[1].parameters())})
        wrapped = DistributedDataParallel(model)
        answers.append(_error(RuntimeError, lambda o=optimizer, w=wrapped: o.backward(_losses(w))))
    return answers


def undefined_gradient(rank, size, source, shard):
    """A function of the user's gives a leaf no gradient: as if it were not there."""
    torch.manual_seed(3)
    w, v = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
    optimizer = dk.DTOAdamW([w, v], lr=0.1, gram=source)
    if size > 1:
        dk.distributed.attach(optimizer, shard=shard)
    weights = []
    for _ in range(3):
        z = NoGradient.apply(w, v)
        optimizer.backward({"task": z.square().sum(), "distill": (z - 1).square().sum() + (v - 2).square().sum()})
        optimizer.step()
        optimizer.zero_grad()
        weights.append(optimizer.balance.weights.clone())
    return [w.detach(), v.detach()], weights


def plain_backward(rank, size):
    """loss.backward() on an attached model."""
    model, optimizer = _linear(size)
    ddp = DistributedDataParallel(model)
    dk.distributed.attach(optimizer, ddp)
    return _error(RuntimeError, _losses(ddp)["task"].backward)


def nonsense(rank, size):
    """Values of attach's options that have no meaning."""
    _, optimizer = _linear(size)
    options = [{name: "no"} for name in ("bucket_bytes", "static_graph", "shard")]
    return [_error((TypeError, ValueError), lambda o=o: dk.distributed.attach(optimizer, **o)) for o in options]


def sparse_gradient(rank, size, shard):
    """A bucket of a parameter whose gradient is sparse."""
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = dk.DTOSGD(embedding.parameters())
    dk.distributed.attach(optimizer, shard=shard)
    return _error(ValueError, lambda: optimizer.backward([embedding(torch.tensor([1])).square().sum() + 1]))


def step_in_no_sync(rank, size):
    """The last part's backward inside no_sync; then the step is repeated properly."""
    model, optimizer = _linear(size)
    ddp = DistributedDataParallel(model)
    dk.distributed.attach(optimizer, ddp)
    with ddp.no_sync():
        optimizer.backward(_losses(ddp))
    message = _error(RuntimeError, optimizer.step)
    optimizer.backward(_losses(ddp))
    optimizer.step()
    return message


def missing_parameter(rank, size):
    """A parameter of the module that no optimizer of ours has."""
    model, _ = _linear(size)
    optimizer = dk.DTOAdamW(model[0].parameters())
    return _error(ValueError, dk.distributed.attach, optimizer, DistributedDataParallel(model))


def nan_on_one(rank, size, where, source="exact", shard=False):
    """Rank 1 sees NaN in its loss or only in a gradient: what changed, how many steps were skipped, then go on."""
    model, optimizer = _linear(size, gram=source)
    ddp = DistributedDataParallel(model)
    dk.distributed.attach(optimizer, ddp, bucket_bytes=64, shard=shard)
    optimizer.backward(_losses(ddp))
    optimizer.step()
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    losses = _losses(ddp)
    if rank == 1 and where == "loss":
        losses["task"] = losses["task"] * float("nan")
    if rank == 1 and where == "gradient":
        model[2].weight.register_hook(lambda g: g * float("nan"))
    optimizer.backward(losses)
    optimizer.step()
    optimizer.zero_grad()
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return same, int(optimizer.skipped_steps), [p.detach().clone() for p in model.parameters()]


def overflow_on_one(rank, size, shard, where):
    """Rank 1 has an infinite gradient or loss under a GradScaler: what changed, how many were skipped, the scale."""
    model, optimizer = _linear(size)
    ddp, scaler = DistributedDataParallel(model), torch.amp.GradScaler("cpu", init_scale=1024)
    dk.distributed.attach(optimizer, ddp, bucket_bytes=64, shard=shard)
    before = [p.detach().clone() for p in model.parameters()]
    losses = _losses(ddp)
    if rank == 1 and where == "gradient":
        model[2].weight.register_hook(lambda g: g * float("inf"))
    if rank == 1 and where == "loss":
        losses["task"] = losses["task"] + float("inf")
    optimizer.backward(losses, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return same, int(optimizer.skipped_steps), scaler.get_scale()


def error_on_one(rank, size, what):
    """Rank 1 is given what it must refuse; the next step works."""
    model, optimizer = _linear(size, gram="none", weighting=weighting.LogSum()) if what == "share" else _linear(size)
    ddp = DistributedDataParallel(model)
    dk.distributed.attach(optimizer, ddp)
    if what == "share":
        optimizer.backward(_losses(ddp), share=0.5)
    losses = _losses(ddp)
    if rank == 1 and what == "constant":
        losses["distill"] = torch.ones((), dtype=torch.float64)
    if rank == 1 and what == "missing":
        del losses["distill"]
    share = 0.75 if rank == 1 and what == "share" else 0.5
    message = _error((ValueError, RuntimeError), lambda: optimizer.backward(losses, share=share))
    optimizer.zero_grad()
    optimizer.backward(_losses(ddp))
    optimizer.step()
    return message, [p.detach().clone() for p in model.parameters()]


def many_microbatches_cost(rank, size, parts):
    """Collectives and bytes of one accumulated step."""
    with Counter() as counter:
        train(rank, size, {"parts": parts, "bucket_bytes": 25 << 20}, steps=2)
    return counter.calls


class Counter:
    """Counts the calls and the elements of torch.distributed's collectives."""

    NAMES = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "broadcast")

    def __enter__(self):
        self.calls, self._kept = [], {name: getattr(dist, name) for name in self.NAMES}
        for name, function in self._kept.items():

            def counted(tensor, *args, _name=name, _function=function, **kwargs):
                self.calls.append((_name, tensor.numel(), str(tensor.dtype)))
                return _function(tensor, *args, **kwargs)

            setattr(dist, name, counted)
        return self

    def __exit__(self, *error):
        for name, function in self._kept.items():
            setattr(dist, name, function)


def sharded_checkpoint(rank, size, folder, loads):
    """Two steps and a checkpoint, or loading it; then two steps more. Also how many moments this rank holds."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    optimizer = dk.DTOAdamW(model.parameters(), lr=0.01)
    ddp = DistributedDataParallel(model)
    dk.distributed.attach(optimizer, ddp, shard=True, bucket_bytes=600)

    def step(batch):
        share = SAMPLES // size
        x, y, _ = (b[rank * share : (rank + 1) * share] for b in batch)
        out = ddp(x)
        optimizer.backward({"task": (out - y).square().mean(), "distill": (out - 1).square().mean()})
        optimizer.step()
        optimizer.zero_grad()

    batches = _batches(4)
    if not loads:
        for batch in batches[:2]:
            step(batch)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    (dcp.load if loads else dcp.save)(state, checkpoint_id=folder)
    if loads:
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for batch in batches[2:]:
        step(batch)
    held = sum(optimizer.state[p]["exp_avg"].to_local().numel() for p in model.parameters())
    return [p.detach() for p in model.parameters()], held


def resumed(rank, size, shard, masters, stop):
    """Four steps, if asked with a new model and optimizer after the second; weights and state."""
    torch.manual_seed(3)
    dtype = torch.bfloat16 if masters else torch.float32
    precision = {"master_weights": True, "state_dtype": torch.float32} if masters else {}

    def make():
        model = Student().to(dtype)
        optimizer = dk.DTOAdamW(model.parameters(), lr=0.01, **precision)
        ddp = DistributedDataParallel(model)
        return model, optimizer, ddp, dk.distributed.attach(optimizer, ddp, shard=shard)

    model, optimizer, ddp, ranks = make()
    share = SAMPLES // size
    for number, batch in enumerate(_batches(4)):
        if stop and number == 2:
            weights, learned = {name: t.clone() for name, t in model.state_dict().items()}, ranks.state_dict()
            everywhere = [dk.distributed.whole_state(optimizer)]
            dist.broadcast_object_list(everywhere, 0)
            model, optimizer, ddp, ranks = make()
            model.load_state_dict(weights)
            optimizer.load_state_dict(everywhere[0])
            ranks.load_state_dict(learned)
        x, y, t = (b[rank * share : (rank + 1) * share].to(dtype) for b in batch)
        out, projected, _ = ddp(x)
        optimizer.backward({"task": (out - y).square().mean(), "distill": (projected - t).square().mean()})
        optimizer.step()
        optimizer.zero_grad()
    state = [whole(t, p) for p in model.parameters() for t in optimizer.state[p].values()]
    return [p.detach() for p in model.parameters()], state


def sharded_refusals(rank, size):
    """What attach(shard=True) must not take."""
    _, lagging = _linear(size, gram="lag")
    _, trained = _linear(size)
    p = trained.param_groups[0]["params"][0]
    trained.state[p]["step"] = torch.ones(())
    conv = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)
    optimizers = [lagging, trained, dk.DTOAdamW(conv.parameters())]
    return [_error(ValueError, lambda o=o: dk.distributed.attach(o, shard=True)) for o in optimizers]


def logged_lines(rank, size, path):
    """A balance log that all ranks keep."""
    from dtokd.monitor import CSV, BalanceLogger

    model, optimizer = _linear(size)
    ddp = DistributedDataParallel(model)
    dk.distributed.attach(optimizer, ddp)
    with BalanceLogger([CSV(f"{path}/{rank}.csv")], every=2, optimizer=optimizer):
        for _ in range(3):
            optimizer.backward(_losses(ddp))
            optimizer.step()
            optimizer.zero_grad()
