"""The backend "cuda" on CPU tensors, through the emulation: what kernels take together, and steps in one launch."""

import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dtokd_kernels as dk
from dtokd_kernels import backends, implementations, reference
from dtokd_kernels.types import Options, Role

from . import emulated, tolerances
from .device import DEVICE
from .pretended import pretending
from .updates import Update, flag, gradient_rows, measure_and_run, run, step_of

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the emulation takes CPU tensors")
SIZES = (5, 0, 4097)
LOSSES = torch.tensor([2.0, 0.5], dtype=torch.float64)


@pytest.fixture
def cuda(emulated_library):
    with emulated.emulated_cuda(emulated_library) as kernels, dk.use_backend("cuda"):
        yield kernels


def tensors(seed, positive=False):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand if positive else torch.randn
    return [draw(n, generator=generator) for n in SIZES]


def update(rule="adamw", role=Role.SHARED, **options):
    grads = [tensors(0), tensors(1)]
    if rule == "sgd":
        numbers = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False, "first": False}
        state = {"momentum_buffer": tensors(3)}
    else:
        numbers = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False}
        state = {"exp_avg": tensors(3), "exp_avg_sq": tensors(4, True), "step": [torch.tensor(3.0) for _ in SIZES]}
        if options.get("amsgrad"):
            state["max_exp_avg_sq"] = tensors(5, True)
    return Update(rule, role, (0, 1), tensors(2), grads, state, {"lr": 0.1, "maximize": False, **numbers, **options})


def copies(updates):
    return [[t.clone() for t in u.tensors()] for u in updates]


def run_both(cuda, updates, table):
    """The tensors of the updates after the CUDA backend, and after the reference on copies."""
    others = [u.clone() for u in updates]
    run(cuda, updates, table, flag())
    run(backends.REFERENCE, others, table, flag())
    return copies(updates), copies(others)


def assert_alike(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)  # float32; test_step.py has the derived bounds


def test_tensors_that_fit_no_kernel_take_the_reference_and_the_others_do_not(cuda):
    table = torch.tensor([[0.5, 0.25], [1, 1], [2, 2]], dtype=torch.float64)
    odd = update(role=Role.PLAIN)
    odd.state["step"] = [torch.tensor(3.0, dtype=torch.float64) for _ in SIZES]  # the kernels know float32
    assert_alike(*run_both(cuda, [update(), odd, update("sgd", Role.PRIVATE)], table))
    _, lacking = step_of(cuda, [update(), odd.clone()])
    assert lacking == {"backend 'cuda' has no kernel for counters of steps of torch.float64": [3, 4, 5]}


def test_gradients_that_are_not_dense_are_copied(cuda):
    sparse_memory = [torch.stack([g, g], -1)[..., 0] for g in tensors(0)]
    both = update()
    both.grads[0] = sparse_memory
    assert not sparse_memory[2].is_contiguous()
    assert_alike(*run_both(cuda, [both], torch.ones(3, 2, dtype=torch.float64)))


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_updates_that_measure_equal_two_launches(cuda, rule, skipped):
    """Bit for bit; an update that fits no kernel goes through the reference, its part of the matrices too."""
    table, skip = torch.tensor([[0.5, 0.25], [1, 1], [2, 0]], dtype=torch.float64), torch.tensor(skipped)
    once = [update(rule), update(rule, Role.PLAIN, maximize=True), update(rule, Role.PRIVATE)]
    if rule == "adamw":
        once[2].state["step"] = [torch.tensor(3.0, dtype=torch.float64) for _ in SIZES]
    twice = [u.clone() for u in once]
    grams = measure_and_run(cuda, once, table, skip)
    run(cuda, twice, table, skip)
    for a, b in zip(copies(once), copies(twice), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for u in once:
        expected = reference.gram(u.grads)
        assert (grams[u.role] - expected).abs().max() <= tolerances.REORDERED * expected.max()


class Operations(TorchDispatchMode):
    """The names of the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_step_of_lag_is_one_update_between_two_balances(cuda):
    """Whatever the groups: one operation reads the gradients. And it is few operations: each costs the host's time."""
    params = [torch.nn.Parameter(t) for t in tensors(0)]
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = dk.DTOAdamW(groups, lr=1e-3, gram="lag")
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward([sum(p.square().sum() for p in params), sum((p - 1).square().sum() for p in params)])
        with Operations() as operations:
            optimizer.step()
    ours = [name.removeprefix("dtokd_emulated::") for name in operations.names if name.startswith("dtokd_emulated::")]
    assert ours == ["balance", "update_", "balance"]
    assert len(operations.names) <= 32, operations.names


def whole(cuda, one, losses, options):
    """A step in one launch."""
    step, _ = step_of(cuda, [one])
    [part] = step.parts
    return cuda.resident(part.rows, step.grads, [one.options], losses, options)


def test_step_in_one_launch_equals_two(cuda):
    options = Options(dk.weighting.DTO(), max_norm=1.0)
    one, two = update(), update()
    record = whole(cuda, one, LOSSES, options)
    expected = cuda.gram_balance(gradient_rows(two.grads), LOSSES, options)
    run(cuda, [two], expected.table, expected.skipped)
    assert record is not None
    assert torch.equal(record.table, expected.table)
    assert all(torch.equal(a, b) for a, b in zip(copies([one])[0], copies([two])[0], strict=True))


@pytest.mark.parametrize("case", ["amsgrad", "weighting", "three objectives", "sgd", "large"])
def test_step_that_does_not_fit_one_launch_changes_nothing(cuda, case, monkeypatch):
    weighting = dk.weighting.LogSum() if case == "weighting" else dk.weighting.DTO()
    options = Options(weighting)
    one = update("sgd") if case == "sgd" else update(amsgrad=case == "amsgrad")
    losses = torch.ones(3).double() if case == "three objectives" else LOSSES
    if case == "large":
        monkeypatch.setattr(implementations, "RESIDENT_PARAMETERS", 10)
    before = copies([one])
    assert whole(cuda, one, losses, options) is None
    assert all(torch.equal(a, b) for a, b in zip(before[0], copies([one])[0], strict=True))


def test_refusals_name_operation_and_argument(cuda):
    ops = torch.ops.dtokd_emulated
    grads, tickets = tensors(0) + tensors(1), torch.zeros(implementations.TICKETS, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="gram: 9 objectives, expected 1 to 8"):
        ops.gram.default(grads, [1] * 6, [0] * 6, 9, tickets)
    with pytest.raises(RuntimeError, match=r"gram: reach\[0\] is 1 and role\[0\] is 5, expected .* 0 to 2"):
        ops.gram.default(grads, [1] * 6, [5] * 6, 2, tickets)
    with pytest.raises(RuntimeError, match="gram: grads has 6 tensors, expected more"):
        ops.gram.default(grads, [1] * 7, [0] * 7, 2, tickets)
    with pytest.raises(RuntimeError, match="gram: tickets must be 4 int32 zeros"):
        ops.gram.default(grads, [1] * 6, [0] * 6, 2, tickets.long())


@pytest.mark.parametrize("launches", [0, 1, 2])
def test_a_launch_that_fails_leaves_the_next_operations_right(cuda, emulated_library, launches):
    """Tensors of three dtypes take a launch each, and the blocks of those before the failure were counted."""
    grads = [[torch.randn(9000).to(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)] for _ in "ab"]
    before = dk.gram(grads)
    emulated.fail_after(emulated_library, launches)
    with pytest.raises(RuntimeError, match="the launch failed"):
        dk.gram(grads)
    assert torch.equal(dk.gram(grads), before)


def test_an_old_driver_or_gpu_is_no_place_for_the_cuda_kernels(monkeypatch):
    """Kernel parameters of 32 KB need a driver for CUDA 12.1; one warning, and the next backend is taken."""
    monkeypatch.setitem(backends.libraries.missing, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for driver, capability, reason in (
        (12010, (8, 0), None),
        (12000, (8, 0), "the driver is for CUDA 12.0"),
        (13000, (7, 5), "GPU 0 has compute capability 7.5"),
    ):
        backends._unfit.cache_clear()
        monkeypatch.setattr(backends, "driver_version", lambda driver=driver: driver)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i, of=capability: of)
        try:
            if reason is None:
                assert backends.missing("cuda") is None
                continue
            with pytest.warns(RuntimeWarning, match=reason):
                assert reason in backends.missing("cuda")
            assert backends.best(torch.device("cuda")) != "cuda"  # and does not warn again: warnings are errors here
        finally:
            backends._unfit.cache_clear()


def test_each_stream_and_each_graph_has_tickets_of_its_own(monkeypatch):
    """Launches that run at the same time must not count each other's blocks; those of a stream run one by one."""
    now = {"device_index": 0, "cuda_stream": 7}
    capturing = False
    monkeypatch.setattr(implementations, "_tickets", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(**now))

    def tickets():
        return implementations.tickets(torch.device("cuda", now["device_index"]))

    with pretending():
        first = tickets()
        assert first.host.tolist() == [0] * implementations.TICKETS
        assert tickets() is first
        now["cuda_stream"] = 8
        second = tickets()
        now |= {"device_index": 1, "cuda_stream": 7}
        third = tickets()
        now["device_index"] = 0
        assert tickets() is first
        capturing = True  # on the first stream: the graph may be replayed on any
        graphs = [tickets(), tickets()]
        capturing = False
        assert tickets() is first
    assert len(set(map(id, (first, second, third, *graphs)))) == 5
    assert implementations.tickets(torch.device("cpu")) is None


def test_two_optimizers_in_turn_are_each_alone(cuda):
    """They share a stream's tickets: between `backward` and `step` of one, the other takes its step."""

    def build(seed):
        torch.manual_seed(seed)
        module = torch.nn.Linear(70, 70)
        return module, dk.DTOAdamW(module.parameters(), lr=1e-2, max_norm=1.0, gram="lag" if seed else "exact")

    def backward(module, optimizer):
        out = module(torch.linspace(-1, 1, 70))
        optimizer.zero_grad()
        optimizer.backward([out.square().mean(), (out - 1).square().mean()])

    alone = [build(seed) for seed in (0, 1)]
    for module, optimizer in alone:
        for _ in range(3):
            backward(module, optimizer)
            optimizer.step()
    together = [build(seed) for seed in (0, 1)]
    for _ in range(3):
        for module, optimizer in together:
            backward(module, optimizer)
        for _, optimizer in reversed(together):
            optimizer.step()
    for (a, _), (b, _) in zip(alone, together, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
