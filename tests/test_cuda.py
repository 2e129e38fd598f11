"""The CUDA operations as torch sees them, and the backend that calls them: on CPU tensors, through the emulation."""

import pytest
import torch

import dtokd_kernels as dk
from dtokd_kernels import cuda, fused, reference
from dtokd_kernels.types import Options, Role, Update

from . import emulated, tolerances
from .device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the emulation takes CPU tensors")
SIZES = (5, 0, 4097)
LOSSES = torch.tensor([2.0, 0.5], dtype=torch.float64)


@pytest.fixture
def ops(emulated_library):
    with emulated.emulated_cuda(emulated_library), dk.use_backend("cuda"):
        yield cuda.OPS


def tensors(seed, positive=False):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand if positive else torch.randn
    return [draw(n, generator=generator) for n in SIZES]


def update(rule="adamw_step", role=Role.SHARED, **options):
    grads = [tensors(0), tensors(1)]
    if rule == "sgd_step":
        numbers = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False, "first": False}
        state = {"momentum_buffers": tensors(3)}
    else:
        numbers = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False}
        steps = [torch.tensor(3.0) for _ in SIZES]
        state = {"exp_avgs": tensors(3), "exp_avg_sqs": tensors(4, True), "max_exp_avg_sqs": [], "state_steps": steps}
    return Update(rule, role, (0, 1), tensors(2), grads, state, {"lr": 0.1, "maximize": False, **numbers, **options})


def calls():
    grads = tensors(0) + tensors(1)
    shape = [len(SIZES)], [0], [3]
    tickets = torch.zeros(fused.TICKETS, dtype=torch.int32)
    gram = torch.tensor([[18.0, -22.0], [-22.0, 38.0]], dtype=torch.float64)
    grams = torch.stack([gram, 0 * gram, gram])
    options = True, True, False, 1.0, 1e-8, 2.0**60
    table, never = torch.ones(3, 2, dtype=torch.float64), torch.tensor(False)
    steps = [torch.tensor(3.0) for _ in SIZES]
    adamw, sgd = [0.1, -1, 0.9, 0.99, 0.1, 1e-8, 0, 0, 0], [0.1, -1, 0.9, 0, 0.1, 0, 0, 0, 0]
    return {
        "gram_by_role": (grads, *shape, 2, tickets),
        "gram_balance": (grads, *shape, 2, LOSSES, *options, tickets),
        "balance_by_role": (grams, LOSSES, None, *options),
        "min_norm_weights": (gram, True, None),
        "combine_": (tensors(2), grads, torch.ones(2, dtype=torch.float64)),
        "adamw_updates_": (
            tensors(2), grads, tensors(3), tensors(4, True), [], steps, [], *shape, table, never, [], adamw, tickets,
        ),
        "gram_adamw_updates_": (
            tensors(2), grads, tensors(3), tensors(4, True), [], steps, [], *shape, table, never, [], adamw, tickets,
        ),
        "sgd_updates_": (tensors(2), grads, tensors(3), [], *shape, table, never, [], sgd),
        "gram_sgd_updates_": (tensors(2), grads, tensors(3), [], *shape, table, never, [], sgd, tickets),
        "resident_adamw_": (
            tensors(2), grads, tensors(3), tensors(4, True), steps, *shape, LOSSES, *options, [], adamw, tickets,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", calls())
def test_opcheck(ops, name):
    torch.library.opcheck(getattr(ops, name).default, calls()[name])


def test_every_operation_is_checked(ops):
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("dtokd_emulated::")}
    assert names == set(calls())


def test_under_torch_compile(ops):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def weights(a, b):
        return cuda.OPS.min_norm_weights.default(torch.stack([a, b]), True, None)

    row = torch.tensor([18.0, -22.0]).double(), torch.tensor([-22.0, 38.0]).double()
    assert torch.allclose(weights(*row), torch.tensor([0.6, 0.4]).double())


def copies(updates):
    return [[t.clone() for t in [*u.params, *(s for v in u.state.values() for s in v)]] for u in updates]


def run_both(updates, table):
    """The tensors of the updates after the CUDA backend, and after the reference on copies."""
    others = [update_like(u) for u in updates]
    never = torch.tensor(False)
    cuda.run_updates(updates, table, never)
    reference.run_updates(others, table, never)
    return copies(updates), copies(others)


def update_like(u):
    state = {name: [t.clone() for t in values] for name, values in u.state.items()}
    return Update(u.rule, u.role, u.reach, [p.clone() for p in u.params], u.grads, state, dict(u.options))


def assert_alike(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)  # float32; test_step.py has the derived bounds


def test_tensors_that_fit_no_kernel_take_the_reference_and_the_others_do_not(ops):
    table = torch.tensor([[0.5, 0.25], [1, 1], [2, 2]], dtype=torch.float64)
    odd = update(role=Role.PLAIN)
    odd.state["state_steps"] = [torch.tensor(3.0, dtype=torch.float64) for _ in SIZES]  # the kernels know float32
    assert_alike(*run_both([update(), odd, update("sgd_step", Role.PRIVATE)], table))


def test_gradients_that_are_not_dense_are_copied(ops):
    sparse_memory = [torch.stack([g, g], -1)[..., 0] for g in tensors(0)]
    both = update()
    both.grads[0] = sparse_memory
    assert not sparse_memory[2].is_contiguous()
    assert_alike(*run_both([both], torch.ones(3, 2, dtype=torch.float64)))


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("rule", ["adamw_step", "sgd_step"])
def test_updates_that_measure_equal_two_launches(ops, rule, skipped):
    """Bit for bit; an update that fits no kernel goes through the reference, its part of the matrices too."""
    table, skip = torch.tensor([[0.5, 0.25], [1, 1], [2, 0]], dtype=torch.float64), torch.tensor(skipped)
    once = [update(rule), update(rule, Role.PLAIN, maximize=True), update(rule, Role.PRIVATE)]
    if rule == "adamw_step":
        once[2].state["state_steps"] = [torch.tensor(3.0, dtype=torch.float64) for _ in SIZES]
    twice = [update_like(u) for u in once]
    grams = cuda.measure_and_update(once, table, skip)
    cuda.run_updates(twice, table, skip)
    for a, b in zip(copies(once), copies(twice), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for u in once:
        expected = reference.gram(u.grads)
        assert (grams[u.role] - expected).abs().max() <= tolerances.REORDERED * expected.max()


def test_step_of_lag_is_one_update(ops):
    """Whatever the groups: one operation reads the gradients."""
    params = [torch.nn.Parameter(t) for t in tensors(0)]
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = dk.DTOAdamW(groups, lr=1e-3, gram="lag")
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward([sum(p.square().sum() for p in params), sum((p - 1).square().sum() for p in params)])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
    names = [e.name.split("::")[1] for e in profile.events() if e.name.startswith("dtokd_emulated::")]
    assert [name for name in names if not name.startswith("balance")] == ["gram_adamw_updates_"]


def test_step_in_one_launch_equals_two(ops):
    options = Options(dk.weighting.DTO(), max_norm=1.0)
    one, two = update(), update()
    record = cuda.run_step([one], LOSSES, options)
    expected = cuda.gram_balance({Role.SHARED: [((0, 1), two.grads)]}, LOSSES, options)
    cuda.run_updates([two], expected.table, expected.skipped)
    assert record is not None
    assert torch.equal(record.table, expected.table)
    assert all(torch.equal(a, b) for a, b in zip(copies([one])[0], copies([two])[0], strict=True))


@pytest.mark.parametrize("case", ["amsgrad", "weighting", "three objectives", "sgd", "large"])
def test_step_that_does_not_fit_one_launch_changes_nothing(ops, case, monkeypatch):
    weighting = dk.weighting.LogSum() if case == "weighting" else dk.weighting.DTO()
    options = Options(weighting)
    one = update("sgd_step") if case == "sgd" else update(amsgrad=case == "amsgrad")
    losses = torch.ones(3).double() if case == "three objectives" else LOSSES
    if case == "large":
        monkeypatch.setattr(cuda, "RESIDENT_PARAMETERS", 10)
    before = copies([one])
    assert cuda.run_step([one], losses, options) is None
    assert all(torch.equal(a, b) for a, b in zip(before[0], copies([one])[0], strict=True))


def test_refusals_name_operation_and_argument(ops):
    grads, tickets = tensors(0) + tensors(1), torch.zeros(fused.TICKETS, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="gram_by_role: 9 objectives, expected 1 to 8"):
        ops.gram_by_role.default(grads, [3], [0], [3], 9, tickets)
    with pytest.raises(RuntimeError, match=r"gram_by_role: roles\[0\] is 5, expected 0 to 2"):
        ops.gram_by_role.default(grads, [3], [5], [3], 2, tickets)
    with pytest.raises(RuntimeError, match="gram_by_role: grads does not hold what counts and reaches say"):
        ops.gram_by_role.default(grads, [4], [0], [3], 2, tickets)
    with pytest.raises(RuntimeError, match="gram_by_role: tickets must be 4 int32 zeros"):
        ops.gram_by_role.default(grads, [3], [0], [3], 2, tickets.long())
