"""Who reaches what does not depend on None against zeros: compiled students, checkpoints, functions of the user's."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from dtokd.train.steps import Filled
from torch import nn
from torch.utils.checkpoint import checkpoint

import dtokd_kernels as dk
from dtokd_kernels import reach
from dtokd_kernels.sources import Ema, Every, Feature, Probe
from dtokd_kernels.types import Role

from . import tolerances
from .oracle import Student, batch, losses_of


def compiled(model):
    torch.compiler.reset()
    student = torch.compile(model, backend="aot_eager")
    return lambda data: losses_of(student, data)


def checkpointed(model):
    return lambda data: losses_of(lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=True), data)


def with_zeros(losses, model):
    """Every loss has a gradient at every parameter, which is zero where there was none."""
    everything = sum(p.sum() for p in model.parameters())
    return {name: loss + 0 * everything for name, loss in losses.items()}


#: From a model to a function from a batch to the losses, with zeros in place of None.
WAYS = {
    "compiled": compiled,
    "checkpointed": checkpointed,
    "zeros": lambda model: lambda data: with_zeros(losses_of(model, data), model),
}
SOURCES = {
    "exact": lambda model: "exact",
    "overlap": lambda model: "overlap",
    "lag": lambda model: "lag",
    "probe": lambda model: Probe([model.trunk, model.head]),
    "probe found": lambda model: "probe",
    "every": lambda model: Every(2),
    "every overlap": lambda model: Every(2, "overlap"),
    "ema": lambda model: Ema(0.5),
    "ema lag": lambda model: Ema(0.5, "lag"),
}


def run(model, losses, steps=5, **options):
    """Steps; their balances, and the roles of the parameters."""
    # a parameter that nothing reaches is not decayed, if autograd says so
    optimizer = dk.DTOAdamW(model.parameters(), lr=1e-2, weight_decay=0.0, **options)
    records = []
    for step in range(steps):
        optimizer.zero_grad()
        optimizer.backward(losses(batch(step)))
        optimizer.step()
        records.append(optimizer.balance)
    plan, roles = optimizer._plan[1], {}
    for p, role in zip(plan.params, plan.layout.role, strict=True):
        roles.setdefault(role, set()).add(p.shape)
    return records, roles, optimizer


def assert_same_steps(one, two):
    for a, b in zip(one, two, strict=True):
        for field in ("weights", "table", "gram", "norm"):
            x, y = getattr(a, field), getattr(b, field)
            assert (x - y).abs().max() <= 10 * tolerances.REORDERED * (1 + y.abs().max()), field


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_zeros_are_as_none(backend, source, way):
    """The weights, the coefficients and the updated parameters are those of the eager graph."""
    if way is checkpointed and source in (SOURCES["probe"], SOURCES["probe found"]):
        pytest.skip("a probe does not see through a reentrant checkpoint")
    plain, model = Student(), Student()
    expected, _, _ = run(plain, lambda data: losses_of(plain, data), gram=source(plain), max_norm=0.5)
    records, _, _ = run(model, way(model), gram=source(model), max_norm=0.5)
    assert_same_steps(records, expected)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p - q).abs().max() <= 100 * tolerances.REORDERED


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_roles(backend, way):
    model = Student()
    _, roles, _ = run(model, way(model))
    assert roles[Role.PRIVATE] == {p.shape for m in (model.head, model.projector) for p in m.parameters()}


@pytest.mark.parametrize("private", ["own", "balanced"])
@pytest.mark.parametrize("gram", ["exact", "overlap"])
def test_backward(backend, gram, private):
    plain, model = Student(), Student()
    for step in range(4):
        expected = dk.backward(losses_of(plain, batch(step)), plain.parameters(), gram=gram, private=private)
        losses = with_zeros(losses_of(model, batch(step)), model)
        record = dk.backward(losses, model.parameters(), gram=gram, private=private)
        assert_same_steps([record], [expected])
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad - (0 if q.grad is None else q.grad)).abs().max() <= 100 * tolerances.REORDERED


def test_backward_holds_no_parameters():
    before = len(reach._known)
    w = nn.Parameter(torch.ones(2))
    dk.backward([w.square().sum(), (w - 2).square().sum()], [w])
    assert len(reach._known) == before + 1
    held = weakref.ref(w)
    del w
    gc.collect()
    assert held() is None
    assert len(reach._known) == before


class Late(nn.Module):
    """A shared parameter, and a head that the second objective reaches with a factor."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))

    def losses(self, factor, shared=1.0):
        task = ((self.shared + self.head - 1).square()).sum()
        return {"task": task, "distill": (shared * self.shared + factor * self.head + 2).square().sum()}


def roles_of(optimizer):
    plan = optimizer._plan[1]
    return {id(p): role for p, role in zip(plan.params, plan.layout.role, strict=True)}


def step(optimizer, losses):
    optimizer.zero_grad()
    optimizer.backward(losses)
    optimizer.step()


@pytest.mark.parametrize("gram", ["exact", "overlap", "lag"])
def test_what_begins_to_be_reached_counts_at_once_and_is_shared_soon(backend, gram):
    """Between looks its gradient is taken as that of a private parameter: nothing is lost."""
    model = Late()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, gram=gram, rescale="none")
    found = []
    for number in range(1, 10):
        losses = model.losses(0.0 if number < 3 else 0.5)
        grads = [torch.autograd.grad(loss, model.head, retain_graph=True)[0] for loss in losses.values()]
        before = model.head.detach().clone()
        step(optimizer, losses)
        role = roles_of(optimizer)[id(model.head)]
        found.append(role == Role.SHARED)
        c = optimizer.balance.table[role]
        assert (model.head - (before - 0.1 * (c[0] * grads[0] + c[1] * grads[1]))).abs().max() <= 1e-12
    assert found == [False] * 3 + [True] * 6


def test_an_objective_that_comes_later_is_looked_for_in_each_step(backend):
    """At its bound it has zeros everywhere: that says nothing of what it reaches."""
    model = Late()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1)
    shared = []
    for number in range(1, 8):
        step(
            optimizer,
            {**model.losses(0.0), **({"distill": 0 * model.losses(0.0)["distill"] + 1} if number < 6 else {})},
        )
        shared.append([roles_of(optimizer)[id(p)] == Role.SHARED for p in (model.shared, model.head)])
    assert shared[:5] == [[True, True]] * 5
    assert shared[5:] == [[True, False]] * 2


def test_first_gradient_of_zero(backend):
    """As below a layer that starts at zero: shared from the second step on."""
    model = Late()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1)
    step(optimizer, model.losses(1.0, shared=0.0))
    step(optimizer, model.losses(1.0))
    assert set(roles_of(optimizer).values()) == {Role.SHARED}


@pytest.mark.parametrize("zeros", [False, True])
def test_looks_are_few(monkeypatch, zeros):
    """One in the first step; where there are zeros, as many again as the number of steps can be halved."""
    model, reads, taken = Student(), [], 0
    monkeypatch.setattr(reach, "read", lambda found: reads.append(taken) or found.tolist())
    optimizer = dk.DTOSGD(model.parameters(), lr=1e-2)
    for taken in range(1, 41):
        losses = losses_of(model, batch(taken))
        step(optimizer, with_zeros(losses, model) if zeros else losses)
    assert reads == ([1, 2, 4, 8, 16, 32] if zeros else [1])
    losses = losses_of(model, batch())
    step(optimizer, {"task": losses["task"], "other": losses["distill"]})  # new pairs
    assert reads[-1] == 40


@pytest.mark.parametrize("source", ["exact", "overlap", "lag", "probe of"])
def test_state(backend, source):
    """A run that goes on from a checkpoint knows what was found, though it would find something else now."""

    def source_of(model):
        return Probe(model) if source == "probe of" else source

    model = Student()
    _, _, optimizer = run(model, WAYS["zeros"](model), 3, gram=source_of(model))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = copy.deepcopy(model)
    other.load_state_dict(weights)
    resumed = dk.DTOAdamW(other.parameters(), lr=1e-2, weight_decay=0.0, gram=source_of(other))
    resumed.load_state_dict(state)
    for number in range(3, 9):
        for m, o in ((model, optimizer), (other, resumed)):
            losses = with_zeros(losses_of(m, batch(number)), m)
            losses["distill"] = losses["distill"] + m.head.bias.sum() ** 2  # in the fourth step it is looked for
            step(o, losses)
        assert torch.equal(optimizer.balance.weights, resumed.balance.weights)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    torch.optim.AdamW(other.parameters()).load_state_dict(state)


def test_state_is_used(backend):
    """What was seen to be shared stays so after a checkpoint, though a gradient is zero in the next step."""
    model = Student()
    _, _, optimizer = run(model, WAYS["zeros"](model), 3)
    resumed = dk.DTOAdamW(model.parameters(), lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    losses = with_zeros(losses_of(model, batch()), model)
    losses["distill"] = (model.projector(torch.ones(5, dtype=torch.float64)) - 1).square().sum() + 0 * losses["distill"]
    step(resumed, losses)
    plan = resumed._plan[1]
    shared = [p for p, role in zip(plan.params, plan.layout.role, strict=True) if role == Role.SHARED]
    assert any(p is model.trunk.weight for p in shared)
    assert all(p is not model.head.weight for p in shared)


def test_feature_needs_no_reach(backend):
    plain, model = Student(), Student()
    expected, _, _ = run(plain, lambda data: losses_of(plain, data), gram=Feature(plain.trunk))
    records, _, _ = run(model, lambda data: with_zeros(losses_of(model, data), model), gram=Feature(model.trunk))
    assert_same_steps(records, expected)


def test_empty_parameters_are_not_looked_at(monkeypatch, backend):
    empty, w = nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(2))
    optimizer = dk.DTOSGD([empty, w], lr=0.1)
    sizes = []
    monkeypatch.setattr(reach, "read", lambda found: sizes.append(len(found)) or found.tolist())
    for _ in range(3):
        step(optimizer, [(w - k).square().sum() + empty.sum() for k in (2, 3)])
    assert sizes == [2]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
@pytest.mark.parametrize("source", [lambda m: "exact", Probe, lambda m: Every(2, Probe(m))])
def test_copies_find_out_by_themselves(source, copied):
    model = Student()
    _, _, optimizer = run(model, WAYS["zeros"](model), 3, gram=source(model))
    other, twin = copied((model, optimizer))
    for m, o in ((model, optimizer), (other, twin)):
        step(o, with_zeros(losses_of(m, batch(9)), m))
    assert torch.equal(optimizer.balance.weights, twin.balance.weights)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
@pytest.mark.parametrize("source", [lambda m: "exact", Probe, lambda m: Every(2, Probe(m))])
def test_a_gradient_that_is_zero_by_chance_after_a_copy(source, copied):
    """The parameter stays shared in the copy too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64))
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, momentum=0.9, gram=source(model))

    def train(model, optimizer, steps):
        for number in steps:
            hidden = model[0](torch.full((2, 4), 1.0 + number, dtype=torch.float64))
            out = model[1](hidden)
            distill = (number < 3) * (out - 1).square().mean() + hidden.square().mean()
            step(optimizer, {"task": out.square().mean() + 1, "distill": distill})

    train(model, optimizer, range(3))
    other, twin = copied((model, optimizer))
    train(model, optimizer, range(3, 6))
    train(other, twin, range(3, 6))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("filled", [False, True], ids=["optimizer", "backward"])
def test_a_gradient_that_is_zero_by_chance_after_a_resume(filled):
    """The parameter stays shared, as in the run that was not stopped."""

    def start():
        torch.manual_seed(0)
        return nn.Linear(4, 3, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)

    def train(modules, steps, state=None):
        params = [p for module in modules for p in module.parameters()]
        options = {"lr": 0.1, "momentum": 0.9}
        optimizer = torch.optim.SGD(params, **options) if filled else dk.DTOSGD(params, **options)
        stepper = None
        if filled:
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            stepper = Filled(
                optimizer, scaler, None, weighting=dk.weighting.DTO(), gram=None, private="own", rescale="sum"
            )
        held = stepper or optimizer
        if state is not None:
            held.load_state_dict(state)
        for step in steps:
            hidden = modules[0](torch.full((2, 4), 1.0 + step, dtype=torch.float64))
            out = modules[1](hidden)
            dead = 0.0 if step == 3 else 1.0
            distill = dead * (out - 1).square().mean() + hidden.square().mean()
            losses = {"task": out.square().mean() + 1, "distill": distill}
            optimizer.zero_grad()
            if stepper is None:
                optimizer.backward(losses)
                optimizer.step()
            else:
                stepper.backward({"objectives": losses}, 1)
                stepper.step()
        return copy.deepcopy(held.state_dict())

    whole = start()
    train(whole, range(5))
    first = start()
    state = train(first, range(3))
    again = start()
    for module, old in zip(again, first, strict=True):
        module.load_state_dict(old.state_dict())
    train(again, range(3, 5), state)
    for module, expected in zip(again, whole, strict=True):
        assert all(map(torch.equal, module.parameters(), expected.parameters()))


@pytest.mark.parametrize("stop", range(1, 10))
def test_resume_while_an_objective_has_had_no_gradient(stop):
    """It begins in step 4, and reaches another parameter from step 6 on; with zeros in place of None all the time."""

    def train(stop):
        torch.manual_seed(0)
        a, b = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
        optimizer = dk.DTOSGD([a, b], lr=0.1)
        for step in range(10):
            if step == stop:
                state, optimizer = optimizer.state_dict(), dk.DTOSGD([a, b], lr=0.1)
                optimizer.load_state_dict(state)
            begun, reaches = float(step >= 4), float(step >= 6)
            task = (a - 1).square().sum() + (b - 1).square().sum()
            second = 1 + begun * ((a + 2).square().sum() + reaches * (b + 2).square().sum())
            optimizer.backward({"task": task, "second": second})
            optimizer.step()
            optimizer.zero_grad()
        return a, b

    assert all(map(torch.equal, train(None), train(stop)))


@pytest.mark.parametrize("change", ["objectives alternate", "a group is added"])
@pytest.mark.parametrize("stop", [5, 6])
def test_resume_knows_all_objectives_and_new_groups(stop, change):
    """A gradient is zero by chance in step 6."""

    def train(stop):
        torch.manual_seed(0)
        a, b, c = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(3))
        params = [a, b]
        optimizer = dk.DTOSGD(params, lr=0.1)
        for step in range(9):
            if step == 4 and change == "a group is added":
                optimizer.add_param_group({"params": [c]})
                params.append(c)
            if step == stop:
                state, optimizer = optimizer.state_dict(), dk.DTOSGD(params[:2], lr=0.1)
                if len(params) == 3:
                    optimizer.add_param_group({"params": [c]})
                optimizer.load_state_dict(state)
            task = (a - 1).square().sum() + (b - 1).square().sum() + c.square().sum()
            other = (a + 2).square().sum() + float(step != 6) * (b + 2).square().sum() + (c - 1).square().sum()
            name = "kl" if step % 2 and change == "objectives alternate" else "feat"
            optimizer.backward({"task": task, name: other})
            optimizer.step()
            optimizer.zero_grad()
        return a, b, c

    assert all(map(torch.equal, train(None), train(stop)))
