"""What only a GPU can show: no stalls, launches, graphs, streams, sizes, the emulation's bits. `make gpu` runs it."""

import pytest
import torch
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels import backends
from dtokd_kernels.sources import Ema
from dtokd_kernels.types import Options, Role

from . import emulated
from .device import DEVICE
from .updates import Update, gradient_rows, measure_and_run, run, step_of

pytestmark = pytest.mark.skipif(
    DEVICE.type != "cuda", reason="runs on a GPU, with DTOKD_TEST_DEVICE=cuda (make gpu does that)"
)
NAMES = [name for name in ("cuda", "triton") if backends.missing(name) is None]
each_backend = pytest.mark.parametrize("name", NAMES)


def model(tensors=40, width=33, seed=0):
    """Many small tensors in two parameter groups."""
    torch.manual_seed(seed)
    layers = [nn.Linear(width, width, device=DEVICE) for _ in range(tensors // 2)]
    return nn.Sequential(*layers)


def groups(module):
    decay = [p for p in module.parameters() if p.dim() > 1]
    rest = [p for p in module.parameters() if p.dim() == 1]
    return [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]


def losses(module, seed=0):
    torch.manual_seed(seed)
    out = module(torch.randn(8, 33, device=DEVICE))
    return {"task": out.square().mean(), "distill": (out - 1).square().mean()}


def warm(optimizer, module):
    """A step, so that state and scratch memory are there."""
    optimizer.backward(losses(module))
    optimizer.step()
    optimizer.zero_grad()


@each_backend
@pytest.mark.parametrize("source", ["exact", "overlap", "lag"])
@pytest.mark.parametrize("kind", [dk.DTOAdamW, dk.DTOSGD])
def test_a_step_does_not_stall_the_host(name, kind, source):
    module = model()
    options = {"momentum": 0.9} if kind is dk.DTOSGD else {}
    optimizer = kind(groups(module), lr=1e-3, max_norm=1.0, backend=name, gram=source, **options)
    warm(optimizer, module)
    values = losses(module)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        optimizer.backward(values)
        optimizer.step()
        optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_at_most_three_launches_for_500_tensors_in_two_groups():
    module = model(500)
    optimizer = dk.DTOAdamW(groups(module), lr=1e-3, max_norm=1.0, backend="cuda")
    warm(optimizer, module)
    optimizer.backward(losses(module))
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    ours = [e.name for e in profile.events() if "dtokd" in e.name and "kernel" in e.name]
    assert 2 <= len(ours) <= 3, ours


def test_a_step_of_lag_reads_the_gradients_in_one_launch():
    module = model(380)  # what a launch's table holds
    optimizer = dk.DTOAdamW(groups(module), lr=1e-3, max_norm=1.0, backend="cuda", gram="lag")
    warm(optimizer, module)
    optimizer.backward(losses(module))
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    ours = [e.name for e in profile.events() if "dtokd" in e.name and ("gram" in e.name or "update" in e.name)]
    assert len(ours) == 1, ours
    assert "gram_update_kernel" in ours[0]


@each_backend
@pytest.mark.parametrize("source", ["exact", "overlap", "lag", Ema(0.5)], ids=repr)
def test_replays_equal_eager_steps_bit_for_bit(name, source):
    """The whole iteration in a CUDA graph, with lr on the device."""

    def build():
        module, lr = model(), torch.tensor(1e-2, device=DEVICE)
        options = {"max_norm": 1.0, "capturable": True, "backend": name, "gram": source}
        return module, lr, dk.DTOAdamW(groups(module), lr=lr, **options)

    data = torch.randn(8, 33, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))

    def iteration(module, optimizer):
        optimizer.zero_grad()
        out = module(data)
        optimizer.backward([out.square().mean(), (out - 1).square().mean()])
        optimizer.step()

    eager, eager_lr, eager_optimizer = build()
    replayed, lr, optimizer = build()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            iteration(replayed, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, runs nothing
        iteration(replayed, optimizer)
    for step, rate in enumerate((1e-2, 1e-2, 1e-2, 5e-3, 2e-3)):
        eager_lr.fill_(rate)
        iteration(eager, eager_optimizer)
        if step >= 2:
            lr.fill_(rate)
            graph.replay()
    for a, b in zip(eager.parameters(), replayed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(eager_optimizer.balance.weights, optimizer.balance.weights)


@pytest.mark.skipif("triton" not in NAMES, reason="no Triton")
def test_a_captured_step_of_triton_takes_three_launches_and_the_tables_of_the_warm_up():
    """Which it keeps: eager steps of others drop their own, and new tensors take that memory."""

    def build():
        module, lr = model(152), torch.tensor(1e-2, device=DEVICE)
        options = {"max_norm": 1.0, "capturable": True, "backend": "triton"}
        optimizer = dk.DTOAdamW(groups(module), lr=lr, **options)
        optimizer.backward(losses(module))
        return module, optimizer

    eager, eager_optimizer = build()
    replayed, optimizer = build()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    others = [torch.ones(1 + i, device=DEVICE) for i in range(200)]
    with torch.cuda.stream(stream):
        for other in others:
            dk.gram([[other]], backend="triton")
        noise = [torch.full((1 + 8 * i,), -1, device=DEVICE) for i in range(500)]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events()]
    ours = [name for name in names if name.startswith(("gram_", "adamw_"))]
    assert 2 <= len(ours) <= 3, names
    assert not any("multi_tensor_apply" in name for name in names), names  # what fills tables
    graph.replay()
    for _ in range(4):
        eager_optimizer.step()
    for a, b in zip(eager.parameters(), replayed.parameters(), strict=True):
        assert torch.equal(a, b)
    del noise


@each_backend
def test_two_streams_at_once(name):
    def run(stream):
        module = model(seed=1)
        with torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.default_stream())
            optimizer = dk.DTOAdamW(groups(module), lr=1e-2, backend=name)
            for i in range(5):
                optimizer.zero_grad()
                optimizer.backward(losses(module, i))
                optimizer.step()
        return module

    alone = run(torch.cuda.Stream())
    torch.cuda.synchronize()
    together = [run(torch.cuda.Stream()) for _ in range(2)]
    torch.cuda.synchronize()
    for module in together:
        assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), module.parameters(), strict=True))


@each_backend
def test_two_optimizers_in_turn_on_one_stream(name):
    """As in `test_cuda.py`; each step finds the tickets as the other's has left them."""

    def steps(modules):
        made = [(module, dk.DTOAdamW(groups(module), lr=1e-2, backend=name)) for module in modules]
        for i in range(3):
            for module, optimizer in made:
                optimizer.zero_grad()
                optimizer.backward(losses(module, i))
            for _, optimizer in reversed(made):
                optimizer.step()

    alone, together = [model(seed=1), model(seed=2)], [model(seed=1), model(seed=2)]
    for module in alone:
        steps([module])
    steps(together)
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@each_backend
def test_more_than_2_to_the_31_elements(name):
    size = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 5 * 2 * size:
        pytest.skip("not enough memory on this GPU")
    a = torch.ones(size, dtype=torch.bfloat16, device=DEVICE)
    b = torch.full_like(a, 2)
    b[-1] = 4
    gram = dk.gram([[a], [b]], backend=name)
    assert gram.tolist() == [[size, 2 * size + 2], [2 * size + 2, 4 * size + 12]]


@pytest.mark.skipif("cuda" not in NAMES, reason="no CUDA extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("K", [1, 2, 3, 8])
def test_same_bits_as_the_emulation(emulated_library, K, dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = (70_001, 5, 0, 4096, 33)
    grads = [[torch.randn(n, generator=generator, device="cpu").to(dtype) for n in sizes] for _ in range(K)]
    moments = [[torch.rand(n, generator=generator, device="cpu").to(dtype) for n in sizes] for _ in range(3)]
    loss = torch.rand(K, generator=generator, device="cpu", dtype=torch.float64) + 0.5

    def update(device, rule="adamw"):
        rows = [[g.to(device) for g in row] for row in grads]
        p, m, v = ([t.to(device).clone() for t in row] for row in moments)
        numbers = {"lr": 1e-2, "weight_decay": 0.1, "maximize": False}
        if rule == "sgd":
            numbers |= {"momentum": 0.9, "dampening": 0.1, "nesterov": True, "first": False}
            state = {"momentum_buffer": m}
        else:
            numbers |= {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False}
            state = {"exp_avg": m, "exp_avg_sq": v, "step": [torch.tensor(3.0, device=device) for _ in sizes]}
        return Update(rule, Role.SHARED, tuple(range(K)), p, rows, state, numbers)

    def on(device, kernels):
        """What every kernel leaves: in two launches, in one that measures, in the one for small models."""
        two, sgd = update(device), update(device, "sgd")
        losses, rows = loss.to(device), gradient_rows(two.grads)
        options = Options(dk.weighting.DTO(), max_norm=1.0)
        record = kernels.gram_balance(rows, losses, options)
        run(kernels, [two, sgd], record.table, record.skipped)
        measured = [update(device), update(device, "sgd")]
        grams = [measure_and_run(kernels, [u], record.table, record.skipped) for u in measured]
        combined = [torch.empty_like(p) for p in two.params]
        kernels.combine(combined, rows, record.table)
        one = update(device)
        step, _ = step_of(kernels, [one])
        whole = kernels.resident(step.parts[0].rows, step.grads, [one.options], losses, options)
        if whole is not None:
            assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))
            assert torch.equal(whole.table, record.table)
        kept = [record.gram, record.weights, record.table, record.norm, *grams, *combined]
        return kept + [t for u in (two, sgd, *measured) for t in u.tensors()]

    on_gpu = on(DEVICE, backends.select(DEVICE, "cuda"))
    with emulated.emulated_cuda(emulated_library) as kernels:
        on_cpu = on(torch.device("cpu"), kernels)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu, on_cpu, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@each_backend
def test_runs_on_the_tensors_device_not_the_current_one(name):
    other = torch.device("cuda", 1)
    gram = dk.gram([[torch.ones(5, device=other)], [torch.ones(5, device=other)]], backend=name)
    assert gram.device == other
    assert gram.tolist() == [[5, 5], [5, 5]]


@each_backend
def test_extra_memory_of_a_step_is_small(name):
    module = nn.Linear(4096, 4096, device=DEVICE)  # 64 MiB
    optimizer = dk.DTOAdamW(module.parameters(), lr=1e-3, backend=name)
    for _ in range(2):
        out = module(torch.ones(1, 4096, device=DEVICE))
        optimizer.zero_grad()
        optimizer.backward([out.square().mean(), (out - 1).square().mean()])
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 1e6
