"""DTOAdamW and DTOSGD on several objectives: what each parameter's direction is, and what a step leaves alone."""

import copy
import gc
import itertools
import math
import weakref

import pytest
import torch
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels import balanced as base

from . import tolerances
from .device import DEVICE
from .inputs import CHUNK
from .oracle import Student, assert_directions, balanced, batch, losses_of, nothing_with_gradient, of_many_reaches
from .sources import copies, state_of

U = 2.0**-53
OPTIMIZERS = {
    "adamw": lambda params, **options: dk.DTOAdamW(params, lr=1e-2, amsgrad=True, **options),
    "sgd": lambda params, **options: dk.DTOSGD(params, lr=1e-2, momentum=0.9, **options),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def assert_unchanged(params, before):
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def step_of_one(params, losses, groups=None, **options):
    """Directions that one step takes: with SGD at lr 1 the parameters move by just these."""
    optimizer = dk.DTOSGD(groups if groups is not None else params, lr=1.0, **{"rescale": "none"} | options)
    before = copies(params)
    optimizer.backward(losses)
    optimizer.step()
    moved = [b - p.detach() for b, p in zip(before, params, strict=True)]
    return optimizer, [m if m.any() else None for m in moved]


# ---- directions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", ["own", "balanced"])
@pytest.mark.parametrize("rescale", ["none", "sum"])
@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("outside", [(), ("scale", "head.bias", "trunk.bias")], ids=["all in", "some out"])
def test_direction_of_every_parameter(backend, outside, max_norm, rescale, private):
    """Shared, private to one objective, outside the balance (a group of its own), and reached by none."""
    model = Student()
    named = dict(model.named_parameters())
    params = list(named.values())
    plain = [name in outside for name in named]
    options = {"max_norm": max_norm, "rescale": rescale, "private": private}
    expected = balanced(list(losses_of(model, batch()).values()), params, plain=plain, **options)
    groups = [
        {"params": [p for n, p in named.items() if n not in outside]},
        {"params": [named[n] for n in outside], "balance": False},
    ]
    optimizer, directions = step_of_one(params, losses_of(model, batch()), groups if outside else None, **options)
    assert_directions(directions, expected)
    record = optimizer.balance
    assert (record.weights - expected.weights).abs().max() <= tolerances.REORDERED
    assert (record.norm - expected.norm).abs() <= tolerances.REORDERED * expected.norm
    if max_norm is not None:
        moved = torch.stack([d.square().sum() for d in directions if d is not None]).sum().sqrt()
        assert abs(moved.item() - max_norm) <= 1e-5  # clip_grad_norm_ divides by norm + 1e-6


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("log_gradients", [True, False])
@pytest.mark.parametrize("loss_floor", [1e-8, 50.0])
def test_weighting_and_floor(backend, loss_floor, log_gradients, clamp):
    model = Student()
    options = {"log_gradients": log_gradients, "clamp": clamp}
    params = list(model.parameters())
    expected = balanced(list(losses_of(model, batch()).values()), params, loss_floor=loss_floor, **options)
    _, directions = step_of_one(
        params, losses_of(model, batch()), weighting=dk.weighting.DTO(**options), loss_floor=loss_floor
    )
    assert_directions(directions, expected)


@pytest.mark.parametrize("K", [1, 3, 8])
def test_many_objectives_of_many_reaches(backend, K):
    """Every size of bucket."""
    params, losses = of_many_reaches(K)
    expected = balanced(losses(), params)
    _, directions = step_of_one(params, losses())
    assert_directions(directions, expected)


def test_objective_that_reaches_nothing_shared(backend):
    """Its private parameters train; the others are balanced as if it were not there."""
    shared, own = nn.Parameter(torch.tensor([1.0, 2.0]).double()), nn.Parameter(torch.tensor([3.0]).double())

    def losses():
        return [(shared - 3).square().sum(), (own - 1).square().sum()]

    optimizer, directions = step_of_one([shared, own], losses())
    assert not optimizer.balance.skipped
    # each parameter is private to its objective: g / L = 2 (x - t) / L
    assert (directions[0] - 2 * torch.tensor([-2.0, -1.0]).double() / 5).abs().max() <= 8 * U
    assert (directions[1] - 2 * torch.tensor([2.0]).double() / 4).abs().max() <= 8 * U


def test_adamw_takes_the_same_direction(backend):
    """AdamW of torch on the expected directions, over a few steps. (SGD above shows the directions themselves.)"""
    model, other = Student(), Student()
    ours = dk.DTOAdamW(model.parameters(), lr=1e-2, eps=1e-3)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2, eps=1e-3)
    worst = 0.0
    for step in range(5):
        ours.zero_grad()
        ours.backward(losses_of(model, batch(step)))
        ours.step()
        params = list(other.parameters())
        expected = balanced(list(losses_of(other, batch(step)).values()), params)
        for p, d in zip(params, expected.directions, strict=True):
            p.grad = d
        theirs.step()
        # an error e of the direction moves m / (sqrt v + eps) by 2 e / eps at most
        worst += 1e-2 * 2 * expected.tolerance / 1e-3 + 16 * U
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert (p - q).abs().max().item() <= 10 * worst  # 10: the error of a step comes back in the next gradient


@each_optimizer
def test_one_group_or_many(backend, make):
    """Groups change neither the Gram matrix nor the step, if their options are the same."""
    one, many = Student(), Student()
    a = make(one.parameters())
    b = make([{"params": [p]} for p in many.parameters()])
    for step in range(5):
        for model, optimizer in ((one, a), (many, b)):
            optimizer.zero_grad()
            optimizer.backward(losses_of(model, batch(step)))
            optimizer.step()
    # the same tensors in the same order are summed, so the same bits come out
    assert_unchanged(one.parameters(), list(many.parameters()))


@each_optimizer
def test_order_of_objectives(backend, make):
    """Names and positions do not matter to the step, beyond the order of roundings."""
    one, two = Student(), Student()
    a, b = make(one.parameters()), make(two.parameters())
    losses = losses_of(one, batch())
    a.backward(losses)
    b.backward(dict(reversed(losses_of(two, batch()).items())))
    a.step()
    b.step()
    assert (a.balance.weights - b.balance.weights.flip(0)).abs().max() <= tolerances.REORDERED
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert (p - q).abs().max() <= tolerances.REORDERED


@each_optimizer
def test_unit_of_a_loss(backend, make):
    """Nats or bits, mean or sum: a constant factor of the losses changes nothing (powers of two: not one bit)."""
    one, two = Student(), Student()
    a, b = make(one.parameters(), rescale="none"), make(two.parameters(), rescale="none")
    for step in range(5):
        a.zero_grad()
        a.backward(losses_of(one, batch(step)))
        a.step()
        losses = losses_of(two, batch(step))
        b.zero_grad()
        b.backward({"task": 1024 * losses["task"], "distill": losses["distill"] / 64})
        b.step()
    assert_unchanged(one.parameters(), list(two.parameters()))


# ---- collecting gradients --------------------------------------------------------------------------


@each_optimizer
def test_accumulation_equals_one_big_batch(backend, make):
    """Losses that are sums over the examples: three backward calls of a third each are one of the whole."""
    whole, parts = Student(), Student()
    a, b = make(whole.parameters()), make(parts.parameters())
    for step in range(3):
        data = batch(step, n=9)
        a.zero_grad()
        a.backward({name: 9 * loss for name, loss in losses_of(whole, data).items()})
        a.step()
        b.zero_grad()
        for i in range(3):
            piece = tuple(t[3 * i : 3 * i + 3] for t in data)
            b.backward({name: 3 * loss for name, loss in losses_of(parts, piece).items()})
        b.step()
        assert (a.balance.weights - b.balance.weights).abs().max() <= tolerances.REORDERED
        assert (a.balance.gram - b.balance.gram).abs().max() <= tolerances.REORDERED * a.balance.gram.max()
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            assert (p - q).abs().max() <= tolerances.REORDERED


def test_accumulation_may_reach_more_each_time(backend):
    """A parameter that only the second call reaches is in the step all the same."""
    shared, late = nn.Parameter(torch.ones(3).double()), nn.Parameter(torch.ones(2).double())
    optimizer = dk.DTOSGD([shared, late], lr=1.0, rescale="none")
    optimizer.backward([shared.sum(), 2 * shared.sum()])
    optimizer.backward([shared.sum() + late.sum(), 2 * shared.sum() + late.sum()])
    optimizer.step()
    assert optimizer.balance.gram.tolist() == [[14.0, 26.0], [26.0, 50.0]]


@each_optimizer
def test_zero_grad_to_none_or_zero(backend, make):
    """Both start afresh; set_to_none=False keeps the memory."""
    one, two = Student(), Student()
    a, b = make(one.parameters()), make(two.parameters())
    for step in range(4):
        for model, optimizer, to_none in ((one, a, True), (two, b, False)):
            optimizer.backward(losses_of(model, batch(100 + step)))  # thrown away
            optimizer.zero_grad(set_to_none=to_none)
            with pytest.raises(RuntimeError, match="there are no gradients; call backward"):
                optimizer.step()
            optimizer.backward(losses_of(model, batch(step)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
    assert_unchanged(one.parameters(), list(two.parameters()))


def test_zero_grad_to_zero_keeps_the_memory(backend):
    """With set_to_none=False the next pass adds to the same tensors, so their addresses stay (for CUDA graphs)."""
    w = nn.Parameter(torch.ones(2))
    optimizer = dk.DTOSGD([w], lr=0.1)
    seen = []
    w.register_post_accumulate_grad_hook(lambda p: seen.append((p.grad.data_ptr(), p.grad.tolist())))
    for _ in range(2):
        optimizer.backward([w.sum(), 2 * w.sum()])
        optimizer.zero_grad(set_to_none=False)
    assert seen[0][0] != seen[1][0]
    assert seen[2:] == seen[:2]


def test_zero_grad_clears_the_users_grad_as_torch_does(backend):
    w = nn.Parameter(torch.ones(2))
    optimizer = dk.DTOSGD([w], lr=0.1)
    w.grad = torch.ones(2)
    optimizer.zero_grad(set_to_none=False)
    assert w.grad.tolist() == [0.0, 0.0]
    optimizer.zero_grad()
    assert w.grad is None


@each_optimizer
def test_step_without_zero_grad_takes_the_same_gradients_again(backend, make):
    """As in torch, gradients stay until zero_grad: a second step uses them, a second backward adds to them."""
    model = Student()
    optimizer = make(model.parameters())
    optimizer.backward(losses_of(model, batch()))
    optimizer.step()
    gram = optimizer.balance.gram
    optimizer.step()
    assert torch.equal(optimizer.balance.gram, gram)
    model.zero_grad()  # does not reach the sets
    with pytest.warns(UserWarning, match=r"DTO\w+.backward: the gradients of the last step are still there"):
        optimizer.backward(losses_of(model, batch()))
    optimizer.step()
    assert (optimizer.balance.norms > gram.diagonal().sqrt()).all()


@each_optimizer
@pytest.mark.filterwarnings("ignore:.*gradients of the last step are still there")
@pytest.mark.parametrize("held", [True, False])
def test_users_grad_is_left_alone(backend, make, held):
    """`.grad` is the user's: the same tensor with the same values after backward and step, or None as before."""
    model = Student()
    if held:
        for p in model.parameters():
            p.grad = torch.full_like(p, 7.0)
    before = [p.grad for p in model.parameters()]
    optimizer = make(model.parameters())
    for _ in range(2):
        optimizer.backward(losses_of(model, batch()))
        optimizer.step()
    for p, grad in zip(model.parameters(), before, strict=True):
        assert p.grad is grad
        assert grad is None or (grad == 7.0).all()


def test_parameters_of_others_get_plain_gradients(backend):
    """What belongs to no group accumulates `.grad` as by plain backward calls."""
    model, plain = Student(), Student()
    optimizer = dk.DTOAdamW(model.trunk.parameters())
    optimizer.backward(losses_of(model, batch()))
    losses = losses_of(plain, batch())
    losses["task"].backward(retain_graph=True)
    losses["distill"].backward()
    assert model.trunk.weight.grad is None
    for name in ("scale", "head.weight", "head.bias", "projector.weight"):
        assert torch.equal(model.get_parameter(name).grad, plain.get_parameter(name).grad)


def test_inputs_restrict_the_passes(backend):
    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1)
    before = copies(model.parameters())
    optimizer.backward(losses_of(model, batch()), inputs=[model.scale])
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [p is model.scale for p in model.parameters()]


@each_optimizer
def test_frees_the_graph(backend, make):
    model = Student()
    optimizer = make(model.parameters())
    losses = losses_of(model, batch())
    optimizer.backward(losses)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        losses["distill"].backward()
    losses = losses_of(model, batch())
    optimizer.backward(losses, retain_graph=True)
    losses["distill"].backward()


@each_optimizer
def test_keeps_no_graph_alive(backend, make):
    model = Student()
    optimizer = make(model.parameters())
    intermediate = model.trunk(batch()[0])
    losses = losses_of(model, batch())
    losses["task"] = losses["task"] + intermediate.square().mean()
    watched = [weakref.ref(intermediate), weakref.ref(losses["task"])]
    optimizer.backward(losses)
    del losses, intermediate
    gc.collect()
    assert all(ref() is None for ref in watched)
    optimizer.step()


def test_zero_grad_gives_gradients_back(backend):
    """No gradient set outlives zero_grad, so a validation pass finds the memory free."""
    w = nn.Parameter(torch.ones(2))
    optimizer = dk.DTOSGD([w], lr=0.1)
    grads = []
    w.register_post_accumulate_grad_hook(lambda p: grads.append(weakref.ref(p.grad)))
    optimizer.backward([w.sum(), 2 * w.sum()])
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert len(grads) == 2
    assert all(ref() is None for ref in grads)


def test_objectives_and_balance(backend):
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters())
    assert optimizer.balance is None
    assert optimizer.objectives == ()
    optimizer.backward(losses_of(model, batch()))
    assert optimizer.objectives == ("task", "distill")
    assert optimizer.balance is None
    optimizer.step()
    assert isinstance(optimizer.balance, dk.Balance)
    optimizer.zero_grad()
    assert isinstance(optimizer.balance, dk.Balance)  # the last step's
    optimizer.backward(list(losses_of(model, batch()).values()))
    assert optimizer.objectives == ("0", "1")


# ---- skipped steps ---------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["scale", "head.bias", "trunk.weight"], ids=["shared", "private", "outside"])
@pytest.mark.parametrize("started", [False, True])
def test_gradient_that_is_not_finite_changes_nothing(backend, make, started, where, bad):
    """No parameter and no state, and the step is counted; the next one is as if nothing was.

    None is made either, but on a GPU, where the host does not know of it: what is made there is all zeros.
    """
    models = [Student(), Student()]
    optimizers = []
    for model in models:
        outside = {"params": list(model.trunk.parameters()), "balance": False}
        inside = [p for n, p in model.named_parameters() if not n.startswith("trunk")]
        optimizers.append(make([{"params": inside}, outside]))
    if started:
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.backward(losses_of(model, batch(1)))
            optimizer.step()
            optimizer.zero_grad()
    (model, undisturbed), (optimizer, other) = models, optimizers
    before, state = copies(model.parameters()), state_of(optimizer)
    for count in (1, 2):
        losses = losses_of(model, batch(2))
        losses["task"] = losses["task"] + nothing_with_gradient(model.get_parameter(where), bad)
        optimizer.backward(losses)
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.balance.skipped
        assert optimizer.skipped_steps == count
    assert_unchanged(model.parameters(), before)
    after = state_of(optimizer)
    assert after.keys() == state.keys() or backend in ("cuda", "triton") or DEVICE.type != "cpu"
    assert all(torch.equal(value, state.get(key, torch.zeros_like(value))) for key, value in after.items())
    for m, o in ((model, optimizer), (undisturbed, other)):
        o.backward(losses_of(m, batch(3)))
        o.step()
    assert optimizer.skipped_steps == 2
    assert other.skipped_steps == 0
    assert_unchanged(model.parameters(), list(undisturbed.parameters()))


@pytest.mark.parametrize(
    ("saved", "skipped", "told"), [*itertools.product(("no", "state"), (0, 1), (False, True)), ("copy", 0, False)]
)
def test_dampened_momentum_is_as_if_a_skipped_step_was_not(backend, monkeypatch, saved, skipped, told):
    """It begins undampened, also where the host learns only afterwards that the first step was skipped, as on a GPU."""
    if not told:
        monkeypatch.setattr(base, "_known_to_skip", lambda record: False)
    models = [Student(), Student()]
    (model, optimizer), (other, undisturbed) = (
        (m, dk.DTOSGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.5)) for m in models
    )
    for step in range(4):
        if step == skipped:
            losses = losses_of(model, batch(1))
            losses["task"] = losses["task"] + nothing_with_gradient(model.get_parameter("scale"), math.nan)
            optimizer.backward(losses)
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.balance.skipped
            if saved == "state":
                optimizer.load_state_dict(optimizer.state_dict())
            if saved == "copy":
                model, optimizer = copy.deepcopy((model, optimizer))
            continue
        for m, o in ((model, optimizer), (other, undisturbed)):
            o.backward(losses_of(m, batch(step)))
            o.step()
            o.zero_grad()
    assert_unchanged(model.parameters(), list(other.parameters()))


@each_optimizer
def test_all_gradients_zero_does_nothing_but_count(backend, make):
    model = Student()
    before = copies(model.parameters())
    optimizer = make(model.parameters(), max_norm=1.0)
    total = sum(p.sum() for p in model.parameters())
    optimizer.backward([total * 0 + 1, total * 0 + 2])
    optimizer.step()
    assert optimizer.balance.skipped
    assert optimizer.skipped_steps == 1
    assert_unchanged(model.parameters(), before)
    assert not any(value.any() for value in state_of(optimizer).values())  # none, or zeros: see above


@each_optimizer
def test_one_objective_without_gradient_is_left_out(backend, make):
    """A loss that is constant in the shared parameters for one step neither stops nor skips it."""
    model, alone = Student(), Student()
    a, b = make(model.parameters()), make(alone.parameters())
    losses = losses_of(model, batch())
    a.backward({"task": losses["task"], "distill": 0 * losses["task"] + 3})
    b.backward({"task": losses_of(alone, batch())["task"]})
    a.step()
    b.step()
    assert a.balance.weights.tolist() == [1.0, 0.0]
    assert not a.balance.vertex
    assert_unchanged(model.parameters(), list(alone.parameters()))


def left_out(how, model, data):
    """A third loss that meets no other one: a constant, one that reaches no parameter, or with a layer of its own."""
    if how == "zeros":
        return 0 * losses_of(model, data)["task"] + 3
    return model.unused.square().sum() if how == "own layer" else torch.ones(()).requires_grad_() * 3


@pytest.mark.parametrize("gram", ["exact", "overlap", "backward"])
@pytest.mark.parametrize("how", ["zeros", "nothing", "own layer"])
def test_a_loss_that_meets_no_other_leaves_these_balanced(how, gram):
    """The weights of two losses are the same beside a third one that has no gradient at what they share."""
    records = []
    for third in (True, False):
        model = Student()
        losses = losses_of(model, batch(5))
        losses |= {"third": left_out(how, model, batch(5))} if third else {}
        if gram == "backward":
            records.append(dk.backward(losses, model.parameters()))
            continue
        optimizer = dk.DTOSGD(model.parameters(), lr=0.1, gram=gram)
        optimizer.backward(losses)
        optimizer.step()
        records.append(optimizer.balance)
    assert (records[0].weights[:2] - records[1].weights).abs().max() <= 8 * U
    assert (records[0].gram[:2, :2] - records[1].gram).abs().max() <= 8 * U * records[1].gram.max()
    assert 0 < records[1].weights[0] < 1
    assert records[0].weights[2] == 0


# ---- kinds of parameters ---------------------------------------------------------------------------


@each_optimizer
def test_frozen_parameters(backend, make):
    model, other = Student(), Student()
    for m in (model, other):
        m.trunk.weight.requires_grad_(False)
    before = model.trunk.weight.clone()
    a = make(model.parameters())
    b = make([p for p in other.parameters() if p.requires_grad])
    for step in range(3):
        for m, o in ((model, a), (other, b)):
            o.zero_grad()
            o.backward(losses_of(m, batch(step)))
            o.step()
    assert torch.equal(model.trunk.weight, before)
    assert not a.state[model.trunk.weight]
    assert_unchanged(model.parameters(), list(other.parameters()))


@each_optimizer
def test_thawing(backend, make):
    """Frozen parameters that start to train in the middle of a run: reach is looked up anew in every step."""
    model = Student()
    model.trunk.weight.requires_grad_(False)
    optimizer = make(model.parameters())
    for step in range(4):
        if step == 2:
            model.trunk.weight.requires_grad_(True)
        before = model.trunk.weight.detach().clone()
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch(step)))
        optimizer.step()
        assert torch.equal(model.trunk.weight, before) == (step < 2)


@each_optimizer
def test_reach_that_changes_from_step_to_step(backend, make):
    """Another set of objectives, and other private parameters, from one step to the next."""
    model, fresh = Student(), Student()
    optimizer = make(model.parameters())
    plans = [("task", "distill"), ("task",), ("distill",), ("distill", "task")]
    for step, names in enumerate(plans):
        optimizer.zero_grad()
        losses = losses_of(model, batch(step))
        optimizer.backward({name: losses[name] for name in names})
        optimizer.step()
        assert optimizer.objectives == names
        assert optimizer.balance.weights.shape == (len(names),)
    other = make(fresh.parameters())
    for step, names in enumerate(plans):  # no memory of a set but what its parameters and state hold
        single = make(fresh.parameters())
        single.load_state_dict(other.state_dict())
        other = single
        losses = losses_of(fresh, batch(step))
        other.backward({name: losses[name] for name in names})
        other.step()
    assert_unchanged(model.parameters(), list(fresh.parameters()))


@each_optimizer
def test_tied_parameters(backend, make):
    """One parameter in two modules is one parameter."""
    trunk = nn.Linear(4, 4, dtype=torch.float64)
    model = nn.Sequential(trunk, nn.Tanh(), trunk)
    untied = nn.Parameter(trunk.weight.detach().clone()), nn.Parameter(trunk.bias.detach().clone())
    x = torch.randn(5, 4, dtype=torch.float64)

    def losses(f):
        out = f(x)
        return [out.square().mean(), (out - 1).square().mean()]

    def functional(x):
        return nn.functional.linear(torch.tanh(nn.functional.linear(x, *untied)), *untied)

    a, b = make(model.parameters()), make(untied)
    a.backward(losses(model))
    b.backward(losses(functional))
    a.step()
    b.step()
    assert_unchanged(model.parameters(), untied)


@each_optimizer
def test_several_dtypes_in_one_optimizer(backend, make):
    """All of them are in one Gram matrix; each is updated in its own type, to rounding as in float64."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    values = [torch.randn(20, dtype=torch.float64).to(d) for d in dtypes]
    targets = [[torch.randn(20, dtype=torch.float64).bfloat16().double() for _ in dtypes] for _ in range(2)]
    params = [nn.Parameter(v.clone()) for v in values]
    wide = [nn.Parameter(v.double()) for v in values]
    ends = []
    for ps in (params, wide):
        optimizer = make(ps)
        optimizer.backward(
            [sum((p.double() - t).square().sum() for p, t in zip(ps, row, strict=True)) for row in targets]
        )
        optimizer.step()
        ends.append((optimizer.balance, copies(ps)))
    (mixed, got), (exact, expected) = ends
    # gradients are rounded to the parameters' type: u of bfloat16 at most
    assert (mixed.gram - exact.gram).abs().max() <= 4 * 2**-8 * exact.gram.max()
    for p, g, e in zip(params, got, expected, strict=True):
        assert p.dtype == g.dtype
        u = tolerances.unit_roundoff(p.dtype)
        assert (g.double() - e).abs().max() <= 2 * u * e.abs().max() + 1e-2 * 16 * 2**-8


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_model(backend, make, dtype):
    """Losses, gradients and state all of two bytes; the record stays float64."""
    model = Student(dtype)
    optimizer = make(model.parameters())
    first = None
    for _ in range(30):
        optimizer.zero_grad()
        losses = losses_of(model, batch(0, dtype))
        optimizer.backward(losses)
        optimizer.step()
        first = first or {name: loss.item() for name, loss in losses.items()}
    assert optimizer.balance.gram.dtype == torch.float64
    assert optimizer.skipped_steps == 0
    assert all(loss.item() < first[name] for name, loss in losses_of(model, batch(0, dtype)).items())
    assert {v.dtype for (_, name), v in state_of(optimizer).items() if name != "step"} == {dtype}


@each_optimizer
def test_channels_last(backend, make):
    """A channels_last model trains as a contiguous one; parameters and state keep their layout."""

    def train(memory_format):
        torch.manual_seed(3)
        model = (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)).double().to(memory_format=memory_format)
        )
        optimizer = make(model.parameters())
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64).to(memory_format=memory_format)
        for _ in range(5):
            out = model(x)
            optimizer.zero_grad()
            optimizer.backward([out.square().mean(), (out - 1).square().mean()])
            optimizer.step()
        return model, optimizer

    contiguous, _ = train(torch.contiguous_format)
    model, optimizer = train(torch.channels_last)
    for p, q in zip(model.parameters(), contiguous.parameters(), strict=True):
        assert (
            p - q
        ).abs().max() <= 5 * tolerances.REORDERED  # another order of sums in the convolutions, 5 steps of feedback
        for name, value in optimizer.state[p].items():
            assert name == "step" or value.stride() == p.stride()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


@each_optimizer
def test_layouts_of_gradients_and_parameters_that_differ(backend, make):
    """A transposed parameter, whose gradient autograd may lay out in either way."""
    base = torch.randn(3, 5, dtype=torch.float64)
    transposed, plain = (
        nn.Parameter(base.t().clone(memory_format=torch.preserve_format)),
        nn.Parameter(base.t().contiguous()),
    )
    assert not transposed.is_contiguous()
    x = torch.randn(4, 3, dtype=torch.float64)
    for w in (transposed, plain):
        optimizer = make([w])
        for _ in range(3):
            out = nn.functional.linear(x, w)
            optimizer.zero_grad()
            optimizer.backward([out.square().mean(), (out - 1).square().mean()])
            optimizer.step()
    assert (transposed - plain).abs().max() <= tolerances.REORDERED


@each_optimizer
def test_model_larger_than_a_chunk(backend, make):
    """Tensors of several chunks among small ones, as real models mix them, against the reference."""
    shapes = [(CHUNK + 5000,), (3,), (300, 300), (1,), (CHUNK,)]
    results = []
    for implementation in (backend, "reference"):
        with dk.use_backend(implementation):
            generator = torch.Generator().manual_seed(5)
            params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
            targets = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
            optimizer = make(params)
            for _ in range(2):
                optimizer.zero_grad()
                far = sum((p - t).abs().mean() for p, t in zip(params, targets, strict=True))
                optimizer.backward([sum(p.square().mean() for p in params), far])
                optimizer.step()
            results.append(copies(params))
    assert all((p - q).abs().max() <= tolerances.REORDERED for p, q in zip(*results, strict=True))


@each_optimizer
def test_gradients_follow_their_parameters(backend, make):
    """Groups deleted, turned around or added between backward and step: as torch, where `.grad` is the parameter's."""
    a, b, c = (nn.Parameter(torch.full((n,), float(n))) for n in (4, 4, 3))
    raw = dk.weighting.DTO(log_gradients=False)
    optimizer = make([{"params": [a]}, {"params": [b]}], weighting=raw)
    expected = nn.Parameter(b.detach().clone())
    alone = make([expected], weighting=raw)
    optimizer.backward([(a - 1).square().sum() + (b + 1).square().sum()])
    alone.backward([(expected + 1).square().sum()])
    optimizer.param_groups.reverse()
    optimizer.add_param_group({"params": [c]})
    del optimizer.param_groups[1]
    optimizer.step()
    alone.step()
    assert torch.equal(b, expected)
    assert torch.equal(a, torch.full((4,), 4.0))
    assert torch.equal(c, torch.full((3,), 3.0))
    optimizer.zero_grad(set_to_none=False)  # keeps memory, of parameters that are there
    optimizer.backward([(b + 1).square().sum() + c.square().sum()])
    optimizer.step()
    assert not torch.equal(c, torch.full((3,), 3.0))


def test_an_objective_at_its_bound_is_left_out(backend):
    """A student that equals its teacher: a clamped loss of 0 has no gradient; the step is that of the others."""
    w, v = (nn.Parameter(torch.ones(3)) for _ in range(2))
    both, one = dk.DTOSGD([w], lr=0.1), dk.DTOSGD([v], lr=0.1)
    both.backward({"task": w.square().sum(), "distill": (w - w.detach()).square().sum().clamp(min=1e-7)})
    one.backward({"task": v.square().sum()})
    both.step()
    one.step()
    assert both.balance.weights.tolist() == [1.0, 0.0]
    assert torch.equal(w, v)


def test_no_learning_rate_hides_no_mistake():
    """Where lr is 0, as in a warm-up's first step, gradients in `.grad` are an error as well."""
    w = nn.Parameter(torch.ones(2))
    optimizer = dk.DTOAdamW([w], lr=0.0)
    w.sum().backward()
    with pytest.raises(RuntimeError, match=r"not loss.backward\(\)"):
        optimizer.step()


# ---- choosing a backend ----------------------------------------------------------------------------


def test_backend_of_an_optimizer(backend, monkeypatch):
    """backend= reaches every operation of a step, and use_backend overrides it."""
    calls = []
    original = dk.reference.balance

    def spy(*args, **kwargs):
        calls.append("reference")
        return original(*args, **kwargs)

    monkeypatch.setattr(dk.reference, "balance", spy)
    w = nn.Parameter(torch.ones(2))
    optimizer = dk.DTOSGD([w], lr=0.1, backend="reference")
    optimizer.backward([w.square().sum()])
    optimizer.step()  # inside use_backend(backend)
    assert calls == (["reference"] if backend == "reference" else [])


@each_optimizer
def test_backends_of_optimizers_agree(make):
    """Chosen by keyword: the same few bits, whichever one it is."""
    ends = []
    for name in ("reference", DEVICE.type):
        if dk.backend_info()[name] != "available":
            pytest.skip(f"backend {name!r}: {dk.backend_info()[name]}")
        model = Student()
        optimizer = make(model.parameters(), backend=name)
        optimizer.backward(losses_of(model, batch()))
        optimizer.step()
        ends.append(copies(model.parameters()))
    assert all((p - q).abs().max() <= tolerances.REORDERED for p, q in zip(*ends, strict=True))


@each_optimizer
def test_stepping_in_any_grad_mode(backend, make):
    """step() neither needs nor records gradients, whatever mode it is called in."""
    for mode in (torch.enable_grad, torch.no_grad):
        model = Student()
        optimizer = make(model.parameters())
        optimizer.backward(losses_of(model, batch()))
        with mode():
            optimizer.step()
        assert all(p.is_leaf and p.requires_grad for p in model.parameters())
        assert not optimizer.balance.weights.requires_grad
