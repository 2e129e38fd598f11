"""Where the Gram matrix comes from: each source against its definition, with several weightings and both optimizers."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dtokd_kernels as dk
from dtokd_kernels import backends
from dtokd_kernels.sources import Ema, Every, Feature, Lag, Probe
from dtokd_kernels.types import Role

from . import tolerances
from .inputs import CHUNK, each_dtype, gradients
from .oracle import Student, assert_directions, balanced, batch, losses_of, nothing_with_gradient
from .updates import Update, gradient_rows, measure_and_run, run


def inverse_norm(gram):
    weights = gram.diagonal().rsqrt()
    return weights / weights.sum()


def weights_by(weighting, gram, losses):
    return weighting(gram, losses) if dk.reference.takes_losses(weighting) else weighting(gram)


def by_loss(gram, losses):
    return losses / losses.sum() + 0 * gram.diagonal()


EPS = torch.finfo(torch.float64).eps
WEIGHTINGS = {
    "dto": dk.weighting.DTO(),
    "affine": dk.weighting.DTO(clamp=False),
    "mgda": dk.weighting.DTO(log_gradients=False),
    "inverse norm": inverse_norm,
    "by loss": by_loss,
}
each_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
OPTIMIZERS = {
    "adamw": lambda params, **options: dk.DTOAdamW(params, lr=1e-2, eps=1e-3, **options),
    "sgd": lambda params, **options: dk.DTOSGD(params, lr=1e-2, momentum=0.9, **options),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
#: From a model to what `gram=` takes.
SOURCES = {
    "exact": lambda model: "exact",
    "overlap": lambda model: "overlap",
    "lag": lambda model: "lag",
    "probe": lambda model: Probe(model.trunk),
    "probe found": lambda model: "probe",
    "feature": lambda model: Feature(model.trunk),
    "every": lambda model: Every(3),
    "ema": lambda model: Ema(0.5),
    "every ema probe": lambda model: Every(2, Ema(0.5, Probe(model.trunk))),
    "ema lag": lambda model: Ema(0.5, "lag"),
    "every overlap": lambda model: Every(2, "overlap"),
}
each_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


def train(model, optimizer, steps, start=0):
    """Steps on a batch each; the weights that each took."""
    weights = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch(step)))
        optimizer.step()
        weights.append(optimizer.balance.weights)
    return torch.stack(weights)


def copies(params):
    return [p.detach().clone() for p in params]


def assert_same(one, two, tolerance=0.0):
    assert all((p - q).abs().max() <= tolerance for p, q in zip(one, two, strict=True))


def full_passes(model, action):
    """How many backward passes reach the first layer's bias during an action."""
    calls = []
    handle = model.trunk.bias.register_hook(lambda grad: calls.append(1))
    action()
    handle.remove()
    return len(calls)


# ---- the same numbers as exact ----------------------------------------------------------------------


@each_optimizer
@each_weighting
@pytest.mark.parametrize("private", ["own", "balanced"])
@pytest.mark.parametrize(
    "source", ["overlap", Every(1), Ema(0.0), Every(1, "overlap"), Ema(0.0, Every(1, "overlap"))], ids=repr
)
def test_as_exact(backend, source, private, weighting, make):
    """What only changes how, or nothing for these numbers, gives the same steps."""
    options = {"weighting": weighting, "private": private, "max_norm": 0.5}
    ends = []
    for gram in ("exact", source):
        model = Student()
        outside = {"params": [model.head.bias], "balance": False}
        inside = [p for n, p in model.named_parameters() if n != "head.bias"]
        optimizer = make([{"params": inside}, outside], gram=gram, **options)
        train(model, optimizer, 3)
        ends.append((optimizer.balance, copies(model.parameters())))
    (exact, expected), (record, actual) = ends
    for field in ("weights", "table", "gram", "cosine", "norms", "norm"):
        a, b = getattr(record, field), getattr(exact, field)
        assert (a - b).abs().max() <= tolerances.REORDERED * max(1.0, b.abs().max().item()), field
    assert record.vertex == exact.vertex
    assert_same(actual, expected, tolerances.REORDERED)


def test_default_is_exact():
    models = [Student(), Student()]
    for model, options in zip(models, ({}, {"gram": "exact"}), strict=True):
        train(model, dk.DTOAdamW(model.parameters(), **options), 2)
    assert_same(models[0].parameters(), models[1].parameters())


@pytest.mark.parametrize("source", ["overlap", "lag"])
@pytest.mark.parametrize("K", [1, 2, 3, 8])
def test_many_objectives_of_many_reaches(backend, K, source):
    """Parameter i is reached by objectives i to K - 1, one more by all, one by all but the last."""
    parts = [nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(K)]
    shared, early = (nn.Parameter(torch.randn(9, dtype=torch.float64)) for _ in range(2))
    targets = torch.randn(K, 9, dtype=torch.float64)

    def losses():
        values = [
            (shared - targets[i]).square().sum() + sum((i + 1) * (p - 1).square().sum() for p in parts[: i + 1])
            for i in range(K)
        ]
        return [v + (early - 2).square().sum() for v in values[:-1]] + values[-1:]

    params = [*parts, shared, early]
    expected = balanced(losses(), params)
    optimizer = dk.DTOSGD(params, lr=1.0, rescale="none", gram=source)
    before = copies(params)
    optimizer.backward(losses())
    optimizer.step()
    moved = [b - p.detach() for b, p in zip(before, params, strict=True)]
    assert_directions([m if m.any() else None for m in moved], expected)


# ---- overlap ------------------------------------------------------------------------------------------


def test_overlap_leaves_nothing_to_step(backend, monkeypatch):
    """The products are taken in the last pass; step takes none."""
    module = backends.select(torch.device("cpu"))
    calls, original = [], module.gram
    monkeypatch.setattr(module, "gram", lambda rows, K: calls.append(rows.layout.reach[0]) or original(rows, K))
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), gram="overlap")
    optimizer.backward(losses_of(model, batch()))
    assert set(calls) == {1, 2, 3}  # reached by one, by the other, by both
    calls.clear()
    optimizer.step()
    assert not calls


def test_overlap_takes_products_during_the_pass(backend, monkeypatch):
    """Buckets are taken as soon as they are full, while autograd is still at work."""
    monkeypatch.setitem(dk.sources.buckets.BUCKET, "cpu", 8)
    module = backends.select(torch.device("cpu"))
    events, original = [], module.gram
    monkeypatch.setattr(module, "gram", lambda rows, K: events.append("gram") or original(rows, K))
    first, second = (nn.Parameter(torch.randn(3, 3, dtype=torch.float64)) for _ in range(2))
    first.register_hook(lambda grad: events.append("first"))
    x = torch.randn(2, 3, dtype=torch.float64)
    optimizer = dk.DTOSGD([first, second], lr=0.1, gram="overlap")
    out = torch.tanh(x @ first) @ second
    optimizer.backward([out.square().mean(), (out - 1).square().mean()])
    assert events == ["first", "gram", "first", "gram"]


@pytest.mark.parametrize("source", ["overlap", "lag"])
def test_hooks_are_removed(backend, source):
    """Also after a pass that failed."""
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), gram=source)

    def hooks():
        return [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]

    optimizer.backward(losses_of(model, batch()))
    assert not any(hooks())

    def fail(grad):
        raise RuntimeError("in the middle of a pass")

    handle = model.trunk.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle of a pass"):
        optimizer.backward(losses_of(model, batch()))
    handle.remove()
    assert not any(hooks())
    assert optimizer.objectives == ()
    optimizer.backward(losses_of(model, batch()))
    optimizer.step()
    assert not optimizer.balance.skipped


def test_overlap_of_checkpointed_segments(backend):
    """A parameter in two checkpointed segments gets its gradient in two parts, and its hook fires twice."""
    ends = []
    for source in ("exact", "overlap"):
        torch.manual_seed(1)
        layer = nn.Linear(3, 3, dtype=torch.float64)
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        out = checkpoint(layer, torch.tanh(checkpoint(layer, x, use_reentrant=True)), use_reentrant=True)
        optimizer = dk.DTOSGD(layer.parameters(), lr=0.1, gram=source)
        optimizer.backward([out.square().mean()])
        optimizer.step()
        ends.append(optimizer.balance.gram)
    assert (ends[0] - ends[1]).abs().max() <= tolerances.REORDERED


@pytest.mark.parametrize("source", ["overlap", "lag"])
def test_frozen_and_added_parameters(backend, source):
    ends = []
    for gram in ("exact", source):
        model = Student()
        model.trunk.weight.requires_grad_(False)
        optimizer = dk.DTOAdamW(model.trunk.parameters(), lr=1e-2, gram=gram)
        train(model, optimizer, 1)
        model.trunk.weight.requires_grad_(True)
        optimizer.add_param_group({"params": [model.scale, *model.head.parameters()]})
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch(1)))
        optimizer.step()
        ends.append(optimizer.balance.gram)
    assert (ends[0] - ends[1]).abs().max() <= tolerances.REORDERED * ends[0].max()


# ---- memory -------------------------------------------------------------------------------------------


@each_source
def test_records_do_not_change_with_the_memory(backend, source):
    """Sources write into their memory; a `Balance` that somebody keeps says what it said."""
    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, gram=source(model))
    kept = []
    for step in range(7):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch(step)))
        optimizer.step()
        record = optimizer.balance
        tensors = [value for value in vars(record).values() if isinstance(value, torch.Tensor)]
        kept += zip(tensors, copies(tensors), strict=True)
    assert all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize("source", [Ema(0.5), Every(3), Lag()], ids=repr)
def test_what_no_step_follows_leaves_the_memory(source):
    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, gram=source)
    train(model, optimizer, 2)
    before = optimizer.state_dict()["gram"]
    optimizer.zero_grad()
    optimizer.backward([*losses_of(model, batch()).values(), model.head.bias.square().sum()])
    optimizer.zero_grad()
    after = optimizer.state_dict()["gram"]
    assert before.keys() == after.keys()
    for a, b in zip(before.values(), after.values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("source", "memory"),
    [
        (lambda: Lag(), lambda source: source._kept),
        (lambda: Ema(0.5), lambda source: source._kept),
        (lambda: Every(2), lambda source: (source._weights, source._gram)),
    ],
    ids=["lag", "ema", "every"],
)
def test_memory_stays_where_a_replayed_graph_finds_it(source, memory):
    """A CUDA graph reads and writes the addresses that it was captured with."""
    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, gram=source())
    train(model, optimizer, 1)
    tensors = memory(optimizer._source)
    before = copies(tensors)
    train(model, optimizer, 4, start=1)
    assert all(a is b for a, b in zip(tensors, memory(optimizer._source), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


# ---- lag ----------------------------------------------------------------------------------------------


@each_weighting
@pytest.mark.parametrize("rescale", ["none", "sum"])
def test_lag_takes_the_previous_weights(backend, rescale, weighting):
    """SGD at lr 1 with the weights of the step before, on this step's gradients and losses."""
    model = Student()
    params = list(model.parameters())
    optimizer = dk.DTOSGD(params, lr=0.1, weighting=weighting, rescale=rescale, gram="lag")
    previous = None
    for step in range(4):
        losses = losses_of(model, batch(step))
        exact = dk.backward(losses, params, weighting, rescale=rescale, retain_graph=True)
        expected = exact.weights if previous is None else previous
        if previous is not None:
            given = dk.sources.source.Given(previous, getattr(weighting, "log_gradients", True))
            for p in params:
                p.grad = None
            exact = dk.backward(losses, params, given, rescale=rescale, gram="exact", retain_graph=True)
        directions = [None if p.grad is None else p.grad.clone() for p in params]
        before = copies(params)
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
        record = optimizer.balance
        assert (record.weights - expected).abs().max() <= tolerances.REORDERED
        for p, b, d in zip(params, before, directions, strict=True):
            assert torch.equal(p, b) if d is None else (b - 0.1 * d - p).abs().max() <= tolerances.REORDERED
        for field in ("coefficients", "gram", "norm", "cosine"):  # of this step
            assert (getattr(record, field) - getattr(exact, field)).abs().max() <= 1e3 * tolerances.REORDERED, field
        log = getattr(weighting, "log_gradients", True)
        values = torch.stack([v.detach() for v in losses.values()])
        scale = 1 / values if log else torch.ones_like(values)
        gram = scale[:, None] * record.gram * scale
        previous = weights_by(weighting, gram, values)


def test_lag_clips_by_the_previous_gram(backend):
    model = Student()
    optimizer = dk.DTOSGD(model.trunk.parameters(), lr=0.1, max_norm=1e-3, rescale="sum", gram="lag")
    train(model, optimizer, 1)
    before = optimizer.balance.gram
    train(model, optimizer, 1, start=1)
    c = optimizer.balance.coefficients
    assert abs((c @ before @ c).sqrt() - 1e-3) <= 1e-6  # clip_grad_norm_ divides by norm + 1e-6
    assert (c @ optimizer.balance.gram @ c).sqrt() != 1e-3


@each_dtype
@pytest.mark.parametrize("K", [1, 2, 3, 5])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_update_that_measures(backend, rule, K, dtype):
    """The same bits as the update and the Gram matrix by themselves, for any number of threads; also where skipped."""
    module = backends.select(torch.device("cpu"))
    shapes = [(CHUNK + 5000,), (3,), (0,), (300, 7)]
    rows = gradients(K + 3, shapes, dtype)
    grads = rows[:K]
    c = torch.linspace(0.0, 1.0, K, dtype=torch.float64)  # the first is 0: not read but for the matrix
    adamw = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False}
    sgd = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "nesterov": True, "first": False}
    options = {"maximize": False, **(adamw if rule == "adamw" else sgd)}
    results = []
    for function, threads in ((run, 1), (measure_and_run, 1), (measure_and_run, 2)):
        for skipped in (False, True):
            torch.set_num_threads(threads)
            params, exp_avgs, exp_avg_sqs = ([t.clone() for t in row] for row in rows[K:])
            exp_avg_sqs = [t.abs() for t in exp_avg_sqs]
            steps = [torch.tensor(3.0) for _ in shapes]
            state = {"momentum_buffer": exp_avgs}
            if rule == "adamw":
                state = {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "step": steps}
            update = Update(rule, Role.SHARED, tuple(range(K)), params, grads, state, options)
            products = function(module, [update], c.expand(3, -1), torch.tensor(skipped))
            results.append((skipped, products, [*params, *exp_avgs, *exp_avg_sqs, *steps]))
    gram = module.gram(gradient_rows(grads), K)[Role.SHARED]
    for skipped, products, tensors in results[2:]:
        assert torch.equal(products[Role.SHARED], gram)
        assert not products[Role.PRIVATE].any()
        expected = results[skipped][2]
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


# ---- partial passes -----------------------------------------------------------------------------------


@each_weighting
def test_probe_of_all_shared_parameters_is_exact(backend, weighting):
    model = Student()
    shared = [*model.trunk.parameters(), model.scale]
    exact = dk.backward(losses_of(model, batch()), model.parameters(), weighting)
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, weighting=weighting, gram=Probe(shared), rescale="none")
    before = copies(model.parameters())
    losses = losses_of(model, batch())
    optimizer.backward(losses)
    optimizer.step()
    record = optimizer.balance
    for field in ("weights", "coefficients", "gram", "cosine"):
        assert (getattr(record, field) - getattr(exact, field)).abs().max() <= 1e3 * tolerances.REORDERED, field
    for p in model.parameters():
        p.grad = None
    moved = [(b - p.detach()) / 0.1 for b, p in zip(before, model.parameters(), strict=True)]
    with torch.no_grad():
        for p, b in zip(model.parameters(), before, strict=True):
            p.copy_(b)
    # the gradient of the sum with constant coefficients, private parameters included
    sum(c * v for c, v in zip(exact.coefficients, losses_of(model, batch()).values(), strict=True)).backward()
    for p, m in zip(model.parameters(), moved, strict=True):
        assert (m - (0 if p.grad is None else p.grad)).abs().max() <= 1e4 * tolerances.REORDERED
    norm = torch.stack([m.square().sum() for m in moved]).sum().sqrt()
    assert (record.norm - norm).abs() <= 1e4 * tolerances.REORDERED


def test_probe_is_its_parameters_gram(backend):
    model = Student()
    losses = losses_of(model, batch())
    rows = [torch.autograd.grad(v, [model.trunk.bias], retain_graph=True) for v in losses.values()]
    optimizer = dk.DTOAdamW(model.parameters(), gram=Probe(model.trunk.bias))
    optimizer.backward(losses)
    optimizer.step()
    assert torch.equal(optimizer.balance.gram, dk.gram(rows))


def test_probe_finds_the_last_shared_parameters(backend):
    """In an exact step; then one full pass a step."""
    blocks = nn.Sequential(*[nn.Linear(8, 8, dtype=torch.float64) for _ in range(20)])
    heads = nn.ModuleList([nn.Linear(8, 2, dtype=torch.float64) for _ in range(2)])
    optimizer = dk.DTOAdamW([*blocks.parameters(), *heads.parameters()], gram="probe")
    x = torch.randn(5, 8, dtype=torch.float64)
    for step in range(3):
        passes = []
        handle = blocks[0].weight.register_hook(lambda grad, passes=passes: passes.append(1))
        z = blocks(x)
        losses = [head(z).square().mean() for head in heads]
        probed = [p for block in blocks[-2:] for p in block.parameters()]  # a twentieth each; a sixteenth is two
        rows = [torch.autograd.grad(v, probed, retain_graph=True) for v in losses]
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
        handle.remove()
        assert len(passes) == (2 if step == 0 else 1)
        if step:
            gram = dk.gram([row[1:] if len(row) == 4 else row for row in rows])
            whole = dk.gram(rows)
            assert any(torch.allclose(optimizer.balance.gram, g, rtol=1e-12, atol=0) for g in (gram, whole))


@pytest.mark.parametrize("passed", [True, False], ids=["features", "module"])
def test_feature_by_hand(backend, passed):
    model = Student()
    x, y, z = batch()
    hidden = torch.tanh(model.trunk(x)) * model.scale
    losses = [(model.head(hidden) - y).square().mean(), (model.projector(hidden) - z).square().mean()]
    point = hidden if passed else model.trunk(x)
    rows = [torch.autograd.grad(v, hidden, retain_graph=True)[0].flatten() for v in losses]
    J = torch.stack(rows) / torch.stack(losses).detach()[:, None]
    expected = dk.min_norm_weights(J @ J.T)
    if passed:
        optimizer = dk.DTOAdamW(model.parameters(), gram=Feature())
        optimizer.backward(losses, features=point)
    else:
        watched = nn.Identity()
        optimizer = dk.DTOAdamW(model.parameters(), gram=Feature(watched))
        with torch.no_grad():
            watched(hidden * 0)
        hidden = watched(hidden)
        losses = [(model.head(hidden) - y).square().mean(), (model.projector(hidden) - z).square().mean()]
        with torch.no_grad():
            watched(hidden * 0)  # a validation pass in between is not the one that the losses come from
        optimizer.backward(losses)
    optimizer.step()
    assert (optimizer.balance.weights - expected).abs().max() <= tolerances.REORDERED


def test_feature_keeps_no_graph_and_no_hook(backend):
    layer = nn.Linear(3, 3)
    source = Feature(layer)
    w = nn.Linear(3, 1)
    out = w(layer(torch.ones(2, 3)))
    dk.backward([out.square().mean(), (out - 1).square().mean()], layer.parameters(), gram=source)
    assert source._output is None
    assert len(layer._forward_hooks) == 1
    del source
    gc.collect()
    assert not layer._forward_hooks


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: Every(3, s), lambda s: Ema(0.5, Every(3, s))])
def test_no_graph_is_kept_between_measurements(backend, wrap):
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), gram=wrap(Feature(model.trunk)))
    held = []
    model.trunk.register_forward_hook(lambda module, given, output: held.append(weakref.ref(output)))
    for step in range(4):
        optimizer.backward(losses_of(model, batch(step)))
        gc.collect()
        assert held[-1]() is None
        optimizer.step()
        optimizer.zero_grad()


# ---- every and ema ------------------------------------------------------------------------------------


@each_weighting
def test_every(backend, weighting):
    """Exact in steps 0 and 3; their weights and one pass in between."""
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), lr=1e-2, weighting=weighting, gram=Every(3))
    measured = None
    for step in range(6):
        losses = losses_of(model, batch(step))
        exact = dk.backward(losses, model.parameters(), weighting, retain_graph=True)
        optimizer.zero_grad()
        assert full_passes(model, lambda losses=losses: optimizer.backward(losses)) == (2 if step % 3 == 0 else 1)
        optimizer.step()
        measured = exact if step % 3 == 0 else measured
        assert (optimizer.balance.weights - measured.weights).abs().max() <= tolerances.REORDERED
        assert (optimizer.balance.gram - measured.gram).abs().max() <= tolerances.REORDERED * measured.gram.max()
        if step % 3:  # with this step's losses
            values = torch.stack([v.detach() for v in losses.values()])
            scale = 1 / values if getattr(weighting, "log_gradients", True) else 1
            assert (optimizer.balance.coefficients - measured.weights * scale).abs().max() <= tolerances.REORDERED


def test_every_measures_anew_for_other_objectives(backend):
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), gram=Every(10))
    train(model, optimizer, 2)
    optimizer.zero_grad()
    task = losses_of(model, batch())["task"]
    optimizer.backward([task, task + 1, task.square()])
    optimizer.step()
    assert optimizer.balance.weights.shape == (3,)


@each_weighting
@pytest.mark.parametrize("inner", ["exact", "overlap", "probe"])
def test_ema(backend, inner, weighting):
    """The average by its definition, of the matrix that the weighting asks for."""
    beta = 0.7
    model = Student()
    shared = [*model.trunk.parameters(), model.scale]
    source = Ema(beta, Probe(shared) if inner == "probe" else inner)
    optimizer = dk.DTOAdamW(model.parameters(), lr=1e-2, weighting=weighting, gram=source)
    grams = []
    for step in range(4):
        losses = losses_of(model, batch(step))
        values = torch.stack([v.detach() for v in losses.values()])
        scale = 1 / values if getattr(weighting, "log_gradients", True) else torch.ones_like(values)
        raw = dk.backward(losses, model.parameters(), retain_graph=True).gram
        grams.append(scale[:, None] * raw * scale)
        shares = torch.tensor([beta ** (step - s) for s in range(step + 1)], dtype=torch.float64)
        average = (torch.stack(grams) * shares[:, None, None]).sum(0) / shares.sum()
        expected = weights_by(weighting, average, values)
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
        assert (optimizer.balance.weights - expected).abs().max() <= 10 * tolerances.REORDERED
        assert (optimizer.balance.gram - raw).abs().max() <= tolerances.REORDERED * raw.max()


def test_ema_of_an_objective_that_is_away(backend):
    """One step without a gradient: weight 0 in it, its squared norm's average as before, its cosine faded."""
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), gram=Ema(0.25))
    train(model, optimizer, 1)
    before = optimizer.state_dict()["gram"]
    optimizer.zero_grad()
    losses = losses_of(model, batch())
    optimizer.backward({"task": losses["task"], "distill": 0 * losses["task"] + 3})
    optimizer.step()
    assert optimizer.balance.weights.tolist() == [1.0, 0.0]
    after = optimizer.state_dict()["gram"]
    assert after["total"][1, 1] == before["total"][1, 1]
    assert after["total"][0, 1] == after["total"][1, 0] == before["total"][0, 1] / 2
    assert after["shares"].tolist() == [1 - 0.25**2, 1 - 0.25]


def random_gram(K, generator):
    """Of gradients of very different lengths, some of them alike or opposite, some dependent."""
    n = int(torch.randint(1, 5, (), generator=generator))
    J = torch.randn(K, n, dtype=torch.float64, generator=generator)
    return (J := J * 10 ** (4 * torch.rand(K, 1, dtype=torch.float64, generator=generator) - 2)) @ J.T


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("K", [2, 3, 8])
def test_ema_stays_a_gram_matrix_whoever_comes_and_goes(beta, K):
    """Positive semidefinite, with cosines of at most 1; and what the docstring says, by its sum over all steps."""
    names = tuple(map(str, range(K)))
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        ema, seen = Ema(beta), []
        for _ in range(30):
            present = torch.rand(K, generator=generator) < 0.2 + 0.08 * seed
            gram = random_gram(K, generator) * present[:, None] * present
            seen.append((gram, present))
            average = ema.average(names, gram)
            ema.commit(names, dk.balance(gram + torch.eye(K), torch.ones(K)))
            norms = average.diagonal().sqrt()
            unit = average / torch.where(norms > 0, norms, 1.0)[:, None] / torch.where(norms > 0, norms, 1.0)
            assert unit.abs().max() <= 1 + 8 * EPS
            assert torch.linalg.eigvalsh(unit).min() >= -8 * K * EPS
            total, steps = torch.zeros_like(gram), torch.zeros(K, dtype=torch.float64)
            for earlier, there in reversed(seen):
                factor = beta ** (steps / 2) * there
                total += (1 - beta) * factor[:, None] * earlier * factor
                steps = steps + there
            shares = torch.where(present, 1 - beta**steps, 1.0)
            expected = (total / (shares[:, None] * shares).sqrt()) * present[:, None] * present
            assert (average - expected).abs().max() <= 1e-12 * expected.abs().max()
            assert ((average == 0) | (present[:, None] & present)).all()


COMES_AND_GOES = {
    "ema": lambda: Ema(0.5),
    "ema slow": lambda: Ema(0.99),
    "every": lambda: Every(2),
    "every ema": lambda: Every(2, Ema(0.9)),
    "lag": lambda: "lag",
    "ema lag": lambda: Ema(0.9, "lag"),
}


@pytest.mark.parametrize("source", COMES_AND_GOES.values(), ids=COMES_AND_GOES)
@pytest.mark.parametrize("name", ["dto", "nashmtl", "cagrad", "alignedmtl"])
def test_objectives_that_come_and_go_are_weighed(backend, source, name):
    """What the weighting sees is a Gram matrix in each step, and what it makes of it is a step."""
    torch.manual_seed(1)
    w = nn.Parameter(torch.randn(6, dtype=torch.float64))
    rule, seen = dk.weighting.from_name(name), []

    def weighting(gram):
        norms = gram.diagonal().sqrt()
        unit = torch.where(gram != 0, gram / norms[:, None] / norms, 0.0)
        seen.append((unit.abs().max() <= 1 + 8 * EPS) & (torch.linalg.eigvalsh(unit).min() >= -32 * EPS))
        return rule(gram)

    weighting.log_gradients = rule.log_gradients
    optimizer = dk.DTOAdamW([w], lr=0.05, weighting=weighting, gram=source())
    generator = torch.Generator().manual_seed(2)
    for _ in range(30):
        present = torch.rand(3, generator=generator) < 0.6
        present[int(torch.randint(3, (), generator=generator))] = True
        slopes = torch.randn(3, 1, dtype=torch.float64, generator=generator).sign() * torch.ones(6)  # parallel
        slopes += 0.1 * torch.randn(3, 6, dtype=torch.float64, generator=generator)
        values = [(w @ slope + 100) if p else 0 * w.sum() + 1 for slope, p in zip(slopes, present, strict=True)]
        optimizer.zero_grad()
        optimizer.backward(values)
        optimizer.step()
        assert optimizer.balance.weights.isfinite().all()
    assert seen
    assert all(seen)
    assert w.isfinite().all()


def test_skipped_lag_reports_its_own_step(backend):
    """Also where no pass follows that would measure, as the host knows that the step is skipped."""
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), gram="lag", max_norm=0.1)
    train(model, optimizer, 1)
    data = batch(1)
    exact = dk.backward(losses_of(model, data), [*model.parameters()])
    losses = losses_of(model, data)
    losses["task"] = losses["task"] + nothing_with_gradient(model.head.bias, float("nan"))
    optimizer.zero_grad()
    optimizer.backward(losses)
    optimizer.step()
    assert optimizer.balance.skipped
    assert (optimizer.balance.gram - exact.gram).abs().max() <= tolerances.REORDERED * exact.gram.max()
    assert (optimizer.balance.cosine - exact.cosine).abs().max() <= tolerances.REORDERED
    assert not optimizer.balance.norm.isfinite()  # the head is private


def test_ema_weighs_with_the_kernel_of_its_backend(monkeypatch):
    """`DTO`'s weights of an average are the backend's too."""
    called = []
    kernels = backends.select(torch.device("cpu"), "cpu")
    own = kernels.min_norm_weights
    monkeypatch.setattr(kernels, "min_norm_weights", lambda *args: called.append(1) or own(*args))
    steps = []
    for backend, calls in (("reference", 0), ("cpu", 1)):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = dk.DTOSGD([p], lr=0.1, gram=Ema(0.5), backend=backend)
        optimizer.backward([(p * torch.tensor([1.0, -1.0, 2.0])).sum() + 9, p.square().sum()])
        optimizer.step()
        assert len(called) == calls
        steps.append(p.detach())
    torch.testing.assert_close(*steps, rtol=1e-13, atol=0)


# ---- an objective at its lower bound ---------------------------------------------------------------------

BOUNDED_WEIGHTINGS = {
    "dto": dk.weighting.DTO,
    "affine": lambda: dk.weighting.DTO(clamp=False),
    "mgda": lambda: dk.weighting.DTO(log_gradients=False),
    "logsum": dk.weighting.LogSum,
    "fixed": lambda: dk.weighting.Fixed([0.3, 0.7]),
    "rlw": dk.weighting.RLW,
    "rlw log": lambda: dk.weighting.RLW(log_gradients=True),
    "famo": dk.weighting.Amortized,
    "eq18": lambda: dk.weighting.Amortized("eq18"),
    "gram": lambda: dk.weighting.Amortized("gram"),
    "uncertainty": dk.weighting.UncertaintyWeighting,
    "nash": lambda: dk.weighting.NashMTL(log_gradients=True),
}


def at_bound(losses):
    """The losses, the last one clamped at its lower bound as the guide advises: a constant with a graph."""
    *rest, (name, loss) = losses.items()
    return {**dict(rest), name: (loss - 1e9).clamp(min=1e-7)}


@pytest.mark.parametrize("rescale", ["none", "sum"])
@pytest.mark.parametrize("make_weighting", BOUNDED_WEIGHTINGS.values(), ids=BOUNDED_WEIGHTINGS)
@pytest.mark.parametrize("source", [lambda model: None, *SOURCES.values()], ids=["default", *SOURCES])
def test_objective_at_its_bound_is_left_out(source, make_weighting, rescale):
    """It has no coefficient and no share of the sum, however the Gram matrix is obtained; others train on."""
    model, lr = Student(), 1e-3
    weighting = make_weighting()
    optimizer = dk.DTOSGD(model.parameters(), lr=lr, weighting=weighting, rescale=rescale, gram=source(model))
    for step in range(9):
        losses = losses_of(model, batch(step))
        if bounded := 2 <= step < 7:
            losses = at_bound(losses)
        params = list(model.parameters())
        grads = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in losses.values()]
        before = copies(params)
        optimizer.zero_grad()
        optimizer.backward(losses)
        one_pass = len(optimizer._sets.grads) == 1
        optimizer.step()
        record = optimizer.balance
        assert not record.skipped
        for p, b, *own in zip(params, before, *grads, strict=True):
            shared = one_pass or all(g is not None for g in own)
            c = record.coefficients if shared else record.private_coefficients
            expected = b - lr * sum(c[i] * g for i, g in enumerate(own) if g is not None)
            assert (p - expected).abs().max() <= 1e-12 * (1 + c.abs().max())
        if not bounded:
            assert (record.weights != 0).any()
        elif one_pass and not getattr(weighting, "log_gradients", True):
            assert not torch.equal(params[0], before[0])  # its loss says nothing: weights of raw gradients as ever
        else:
            assert record.weights[1] == record.coefficients[1] == 0
            if rescale == "sum":
                assert (record.coefficients[0] - 1).abs() <= EPS
            else:
                scale = 1 / losses["task"] if getattr(weighting, "log_gradients", True) else 1.0
                assert (record.coefficients[0] - record.weights[0] * scale).abs() <= 4 * EPS * scale
            assert record.weights[0] > 0


def test_kept_weights_of_objectives_at_their_bound_alone(backend):
    """Every kept all weight for one objective that is then at its bound: the three others count alike."""
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    last = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    optimizer = dk.DTOSGD([w], lr=0.0, weighting=lambda gram: last, gram=Every(3), rescale="none")
    for _ in range(2):
        losses = {name: (w + i).square().sum() + 1 for i, name in enumerate("abcd")}
        optimizer.zero_grad()
        optimizer.backward(at_bound(losses) if optimizer.balance else losses)
        optimizer.step()
    assert optimizer.balance.weights.tolist() == [1 / 3, 1 / 3, 1 / 3, 0.0]
    assert not optimizer.balance.skipped


@pytest.mark.parametrize("reading", ["famo", "eq18"])
@pytest.mark.parametrize("observed", [False, True])
def test_weights_are_not_learned_of_an_objective_at_its_bound(reading, observed):
    """What is learned is what the two others alone would have taught."""
    logits = []
    for third in (True, False):
        torch.manual_seed(3)
        w = nn.Parameter(torch.randn(4, dtype=torch.float64))
        weighting = dk.weighting.Amortized(reading, weight_decay=0.0)
        optimizer = dk.DTOSGD([w], lr=1e-2, weighting=weighting)

        def losses(w=w, third=third):
            two = {"a": (w - 1).square().sum() + 1, "b": 3 * (w + 1).square().sum()}
            return at_bound({**two, "c": w.sum()}) if third else two

        for _ in range(40):
            optimizer.zero_grad()
            optimizer.backward(losses())
            optimizer.step()
            if observed and reading == "famo":
                weighting.observe({name: loss.detach() for name, loss in losses().items()})
        logits.append(weighting.state_dict()["learned"])
    assert logits[0][2] == 0
    assert (logits[0][:2] - logits[1]).abs().max() <= 1e-12
    assert logits[1].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [1, 4])
def test_bound_in_each_dtype_and_in_parts(dtype, parts):
    w = nn.Parameter(torch.ones(3))
    optimizer = dk.DTOSGD([w], weighting=dk.weighting.LogSum())
    for _ in range(parts):
        optimizer.backward([w.square().sum() / parts, (0 * w.sum()).to(dtype).clamp(min=1e-7).double() / parts])
    optimizer.step()
    assert optimizer.balance.coefficients[1] == 0
    assert optimizer.balance.coefficients[0] == 1


def test_small_losses_are_no_bound_where_the_floor_is_lower():
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    kept = {"default": (1e-8, {}), "lower": (1e-8, {"loss_floor": 1e-12}), "higher": (1e-3, {"loss_floor": 1.0})}
    weights = {}
    for name, (size, options) in kept.items():
        optimizer = dk.DTOSGD([w], lr=0.0, weighting=dk.weighting.LogSum(), **options)
        optimizer.backward([w.square().sum(), size * w.square().sum()])
        optimizer.step()
        weights[name] = optimizer.balance.weights.tolist()
    assert weights == {"default": [0.5, 0.0], "lower": [0.5, 0.5], "higher": [0.5, 0.5]}


def test_all_objectives_at_their_bound():
    w = nn.Parameter(torch.ones(3))
    for weighting in (dk.weighting.LogSum(), dk.weighting.Amortized()):
        optimizer = dk.DTOSGD([w], weighting=weighting)
        optimizer.backward(at_bound({"a": w.sum()}))
        optimizer.step()
        assert optimizer.balance.skipped


# ---- one pass of a weighted sum ------------------------------------------------------------------------


@pytest.mark.parametrize("log_gradients", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.3])
def test_weightings_without_gram_take_one_pass(backend, max_norm, log_gradients):
    """As torch's AdamW on the weighted sum, clipped by torch."""
    model, other = Student(), Student()
    weighting = dk.weighting.Fixed([0.3, 0.7], log_gradients=log_gradients)
    ours = dk.DTOAdamW(model.parameters(), lr=1e-2, weighting=weighting, max_norm=max_norm)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2)
    for step in range(5):
        losses = losses_of(model, batch(step))
        ours.zero_grad()
        assert full_passes(model, lambda losses=losses: ours.backward(losses)) == 1
        ours.step()
        theirs.zero_grad()
        task, distill = losses_of(other, batch(step)).values()
        a, b = (0.3 / task.detach(), 0.7 / distill.detach()) if log_gradients else (0.3, 0.7)
        (a * task + b * distill).backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), max_norm or torch.inf)
        theirs.step()
        assert (ours.balance.norm - norm).abs() <= tolerances.REORDERED
        assert_same(model.parameters(), other.parameters(), 1e3 * tolerances.REORDERED)
    assert ours.balance.weights.tolist() == [0.3, 0.7]
    assert ours.balance.gram.isnan().all()
    assert not ours.balance.skipped


def test_exact_still_measures_what_fixed_weights_do_not_need(backend):
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), weighting=dk.weighting.Fixed(), gram="exact")
    train(model, optimizer, 1)
    assert optimizer.balance.gram.isfinite().all()


@pytest.mark.parametrize("rescale", ["none", "sum"])
@pytest.mark.parametrize("weighting", [dk.weighting.Fixed(), dk.weighting.LogSum(), None], ids=["raw", "log", "dto"])
@pytest.mark.parametrize("parts", [1, 4])
def test_accumulation_in_one_pass(backend, parts, weighting, rescale):
    """The same batch in n calls with a share of 1 / n each: as one call."""
    ends = []
    for n in (1, parts):
        model = Student()
        gram = None if weighting is not None else Probe(model.trunk)
        optimizer = dk.DTOSGD(model.parameters(), lr=0.1, weighting=weighting, rescale=rescale, gram=gram)
        for _ in range(n):
            optimizer.backward(losses_of(model, batch()), share=1 / n)
        optimizer.step()
        ends.append((optimizer.balance, copies(model.parameters())))
    (one, expected), (many, actual) = ends
    assert (one.norm - many.norm).abs() <= tolerances.REORDERED
    assert_same(actual, expected, tolerances.REORDERED)


@each_source
@each_optimizer
def test_accumulation(backend, make, source):
    """Equal parts of a batch, whatever measures: as the whole, but for rounding."""
    ends = []
    for n in (1, 4):
        model = Student()
        optimizer = make(model.parameters(), gram=source(model))
        for step in range(4):
            optimizer.zero_grad()
            for _ in range(n):
                optimizer.backward(losses_of(model, batch(step)), share=1 / n)
            optimizer.step()
        ends.append(copies(model.parameters()))
    assert_same(ends[0], ends[1], 1e3 * tolerances.REORDERED)


# ---- all sources ---------------------------------------------------------------------------------------


def state_of(optimizer):
    return {
        (i, n): v.clone() for i, s in optimizer.state_dict()["state"].items() for n, v in s.items() if v is not None
    }


@each_source
@each_optimizer
@pytest.mark.parametrize("change", ["times nan", "plus inf", "minus inf"])
@pytest.mark.parametrize("started", [0, 1])
def test_loss_that_is_not_finite_changes_nothing(backend, started, change, make, source):
    """As a gradient: on a CPU it is no error either. The gradients of the last two are finite."""
    model = Student()
    optimizer = make(model.parameters(), gram=source(model))
    if started:
        train(model, optimizer, started)
        optimizer.zero_grad()
    before = copies(model.parameters())
    losses = losses_of(model, batch(7))
    loss = losses["task"]
    losses["task"] = {"times nan": loss * torch.nan, "plus inf": loss + torch.inf, "minus inf": loss - torch.inf}[
        change
    ]
    optimizer.backward(losses)
    optimizer.step()
    assert optimizer.balance.skipped
    assert optimizer.skipped_steps == 1
    assert_same(model.parameters(), before)
    assert train(model, optimizer, 3, start=started).isfinite().all()
    assert optimizer.skipped_steps == 1


@each_source
@each_optimizer
@pytest.mark.parametrize("where", ["scale", "head.bias", "trunk.weight"], ids=["shared", "private", "probed"])
@pytest.mark.parametrize(("started", "bad"), [(0, float("nan")), (1, float("inf")), (2, float("-inf"))])
def test_gradient_that_is_not_finite_changes_nothing(backend, started, bad, where, make, source):
    """In a step that measures or not, the first or a later one; the next step is a good one again."""
    model = Student()
    optimizer = make(model.parameters(), gram=source(model))
    if started:
        train(model, optimizer, started)
        optimizer.zero_grad()
    before, state = copies(model.parameters()), state_of(optimizer)
    losses = losses_of(model, batch(7))
    losses["task"] = losses["task"] + nothing_with_gradient(model.get_parameter(where), bad)
    optimizer.backward(losses)
    optimizer.step()
    assert optimizer.balance.skipped
    assert optimizer.skipped_steps == 1
    assert_same(model.parameters(), before)
    after = state_of(optimizer)
    assert after.keys() == state.keys() or backend in ("cuda", "triton")  # there made before it is known
    assert all(torch.equal(value, state.get(key, torch.zeros_like(value))) for key, value in after.items())
    weights = train(model, optimizer, 3, start=started)
    assert weights.isfinite().all()
    assert optimizer.skipped_steps == 1
    assert not any(
        torch.equal(p, b) for (n, p), b in zip(model.named_parameters(), before, strict=True) if n == "scale"
    )


@each_source
@each_optimizer
def test_all_gradients_zero_does_nothing_but_count(backend, make, source):
    model = Student()
    optimizer = make(model.parameters(), gram=source(model))
    train(model, optimizer, 1)
    before = copies(model.parameters())
    optimizer.zero_grad()
    optimizer.backward({name: 0 * value + 1 for name, value in losses_of(model, batch()).items()})
    optimizer.step()
    assert optimizer.balance.skipped
    assert_same(model.parameters(), before)


@each_source
@each_optimizer
def test_state_in_the_middle_of_a_run(backend, make, source):
    """Saved, loaded and gone on: the same bits as without."""
    model, other = Student(), Student()
    optimizer = make(model.parameters(), gram=source(model))
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    resumed = make(other.parameters(), gram=source(other))
    resumed.load_state_dict(saved["optimizer"])
    expected = train(model, optimizer, 4, start=4)
    assert torch.equal(train(other, resumed, 4, start=4), expected)
    assert_same(model.parameters(), other.parameters())


@each_source
def test_state_and_torch(backend, source):
    """torch's AdamW loads it, and from torch's the source starts anew; so it does from another source's."""
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), gram=source(model))
    train(model, optimizer, 2)
    theirs = torch.optim.AdamW(model.parameters())
    theirs.load_state_dict(optimizer.state_dict())
    assert theirs.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    for state in (theirs.state_dict(), {**theirs.state_dict(), "gram": {"what": 1, "source": {}}}):
        optimizer.load_state_dict(state)
        memory = optimizer.state_dict().get("gram", {})
        assert not memory.keys() - {"source"}
    train(model, optimizer, 2)


@each_source
def test_copies(backend, source):
    """deepcopy of model and optimizer together: the copy trains as the original."""
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), gram=source(model))
    train(model, optimizer, 2)
    twin, other = copy.deepcopy((model, optimizer))
    expected = train(model, optimizer, 3, start=2)
    assert torch.equal(train(twin, other, 3, start=2), expected)
    assert_same(model.parameters(), twin.parameters())


@each_source
@each_optimizer
def test_closure(backend, make, source):
    one, two = Student(), Student()
    a, b = make(one.parameters(), gram=source(one)), make(two.parameters(), gram=source(two))

    def closure():
        b.zero_grad(set_to_none=False)
        losses = losses_of(two, batch())
        b.backward(losses)
        return sum(losses.values())

    for _ in range(3):
        a.zero_grad()
        a.backward(losses_of(one, batch()))
        a.step()
        assert b.step(closure) > 0
    assert_same(one.parameters(), two.parameters())


@each_source
def test_clipping(backend, source):
    """After combining, to the norm of what is applied; lag estimates that."""
    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=1.0, max_norm=0.01, gram=source(model))
    lagging = "lag" in repr(optimizer._source).lower()
    for step in range(4):
        before = copies(model.parameters())
        train(model, optimizer, 1, start=step)
        moved = [(b - p).square().sum() for b, p in zip(before, model.parameters(), strict=True)]
        if not (lagging and step):
            assert abs(torch.stack(moved).sum().sqrt() - 0.01) <= 1e-6  # clip_grad_norm_ divides by norm + 1e-6


@each_source
def test_step_again_and_retained_graphs(backend, source):
    """Gradients stay until zero_grad, so does what measured them; retain_graph keeps the graph."""
    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=1e-3, gram=source(model))
    train(model, optimizer, 2)
    for _ in range(2):
        optimizer.step()
        assert not optimizer.balance.skipped
    with pytest.warns(UserWarning, match="gradients that a step has taken are still there"):
        optimizer.backward(losses_of(model, batch(3)))
    optimizer.step()
    optimizer.zero_grad()
    losses = losses_of(model, batch())
    optimizer.backward(losses, retain_graph=True)
    losses["task"].backward()


def test_a_model_with_a_feature_can_be_copied_and_pickled():
    """A copy's outputs are its own affair: an EMA model runs between the forward and the backward pass."""
    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, gram=Feature(model.trunk))
    average = copy.deepcopy(model)
    pickle.loads(pickle.dumps((model, optimizer)))
    losses = losses_of(model, batch())
    losses_of(average, batch(1))
    optimizer.backward(losses)
    optimizer.step()
    assert not optimizer.balance.skipped


@each_source
def test_one_choice_for_two_optimizers(backend, source):
    """Each has a memory of its own."""
    models = [Student(), Student(), Student()]
    both = source(models[0]) if source is not SOURCES["feature"] else Feature(models[0].trunk)
    a = dk.DTOAdamW(models[0].parameters(), gram=both)
    expected = dk.DTOAdamW(models[1].parameters(), gram=source(models[1]))
    c = dk.DTOAdamW(models[0].parameters(), gram=both)
    for step in range(3):
        train(models[0], a, 1, start=step)
        train(models[1], expected, 1, start=step)
        with torch.no_grad():
            state = copy.deepcopy(models[0].state_dict())
        train(models[0], c, 1, start=9 - step)
        models[0].load_state_dict(state)
    assert_same(models[0].parameters(), models[1].parameters())


# ---- backward for any optimizer ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in SOURCES if "lag" not in n])
@each_weighting
def test_backward(backend, weighting, name):
    """As an optimizer of its own: the same source, call by call."""
    one, two = Student(), Student()
    source = SOURCES[name](one)
    optimizer = dk.DTOSGD(two.parameters(), lr=0.05, weighting=weighting, rescale="none", gram=SOURCES[name](two))
    kept = Probe() if source == "probe" else source  # a name is a new object in each call, without memory
    for step in range(4):
        for p in one.parameters():
            p.grad = None
        record = dk.backward(losses_of(one, batch(step)), one.parameters(), weighting, gram=kept)
        expected = train(two, optimizer, 1, start=step)[0]
        assert (record.weights - expected).abs().max() <= 1e3 * tolerances.REORDERED
        with torch.no_grad():
            for p in one.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad
        assert_same(one.parameters(), two.parameters(), 1e3 * tolerances.REORDERED)


def test_backward_of_a_weighting_without_gram(backend):
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    record = dk.backward([w.sum(), (2 * w).sum()], [w], dk.weighting.Fixed([0.5, 0.25]), max_norm=None)
    assert w.grad.tolist() == [1.0, 1.0]
    assert record.coefficients.tolist() == [0.5, 0.25]


# ---- refusals ------------------------------------------------------------------------------------------

BAD = {
    "name": ("exakt", r"gram is 'exakt'; choose one of 'exact', 'overlap', 'lag'"),
    "type": (3, r"gram is 3; pass one of 'exact', 'overlap', 'lag'"),
    "none": ("none", r"gram is 'none', but weighting DTO\(.*\) needs the Gram matrix; choose another"),
}


@pytest.mark.parametrize("op", ["DTOAdamW", "DTOSGD", "backward"])
@pytest.mark.parametrize("case", BAD)
def test_bad_choice(case, op):
    gram, message = BAD[case]
    w = nn.Parameter(torch.ones(2))
    with pytest.raises((TypeError, ValueError), match=f"^{op}: {message}"):
        dk.backward([w.sum()], [w], gram=gram) if op == "backward" else getattr(dk, op)([w], gram=gram)
    assert w.grad is None


BAD_PARTS = {
    "n": (lambda: Every(0), r"Every: n is 0; pass a positive number of steps"),
    "n float": (lambda: Every(2.5), r"Every: n is 2.5; pass a positive number of steps"),
    "beta": (lambda: Ema(1.0), r"Ema: beta is 1.0; pass a number from 0 to below 1"),
    "source": (lambda: Ema(0.5, "exakt"), r"Ema: source is 'exakt'; choose one of"),
    "source type": (lambda: Every(2, 7), r"Every: source is 7; pass one of"),
    "source none": (lambda: Every(2, "none"), r"Every: source is 'none', which measures no Gram matrix"),
    "no parameter": (lambda: Probe(nn.ReLU()), r"Probe: ReLU\(\) has no parameter; probe the last block"),
    "probe type": (lambda: Probe(["trunk"]), r"Probe: of holds a str; pass modules or parameters"),
    "feature type": (lambda: Feature(torch.ones(2)), r"Feature: of is a Tensor; pass the module whose output"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_bad_parts(case):
    make, message = BAD_PARTS[case]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        make()


BAD_CALLS = {
    "probe of others": (
        lambda m: Probe(nn.Linear(2, 2)), None, r"gram=Probe\(.*\) matches no parameter that is optimized",
    ),
    "probe of a head": (
        lambda m: Probe(m.head), None, r"no parameter of gram=Probe\(.*\) is reached by all objectives \['task', 'dist",
    ),
    "no features": (lambda m: Feature(), None, r"gram=Feature\(\) has no features for this call; pass backward\("),
    "not run": (lambda m: Feature(nn.ReLU()), None, r"gram=Feature\(ReLU\) has no features for this call; run its"),
    "detached": (lambda m: Feature(), lambda h: h.detach(), r"features\[0\] is a tensor without gradient"),
    "no tensor": (lambda m: Feature(), lambda h: [3], r"features\[0\] is a int; pass the tensor"),
    "elsewhere": (
        lambda m: Feature(), lambda h: h * 2, r"objective 'task' was not computed from the features of gram=Feature",
    ),
}  # fmt: skip


@each_optimizer
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_change_nothing(backend, case, make):
    source, features, message = BAD_CALLS[case]
    model = Student()
    optimizer = make(model.parameters(), gram=source(model))
    before = copies(model.parameters())
    losses = losses_of(model, batch())
    z = None if features is None else features(model.trunk(batch()[0]))
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.backward(losses, features=z)
    assert optimizer.objectives == ()
    assert_same(model.parameters(), before)
    assert not optimizer.state_dict()["state"]
    losses["task"].backward()  # the graph is whole


def test_probe_without_shared_parameters(backend):
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = dk.DTOAdamW([a, b], gram="probe")
    optimizer.backward([a.sum(), b.sum()])
    message = r"gram=Probe\(\) found no parameter that all objectives reach; pass those"
    with pytest.raises(ValueError, match=f"^DTOAdamW.step: {message}"):
        optimizer.step()
    assert a.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=f"^backward: {message}"):
        dk.backward([a.sum(), b.sum()], [a, b], gram="probe")


@pytest.mark.parametrize("change", ["frozen", "removed"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_probe_whose_parameters_are_gone_finds_others(backend, change, set_to_none):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer = dk.DTOAdamW([{"params": model[2].parameters()}, {"params": model[0].parameters()}], gram="probe")
    optimizer.param_groups.reverse()  # the last ones are probed

    def step():
        out = model(torch.ones(3, 4))
        optimizer.backward([out.square().mean(), (out - 1).square().mean()])
        optimizer.step()
        optimizer.zero_grad(set_to_none)
        return optimizer.balance.gram[0, 0], optimizer._sets.grads

    step()
    assert len(step()[1]) in (0, 1)  # one pass
    if change == "frozen":
        model[2].requires_grad_(False)
    else:
        del optimizer.param_groups[1]
    exact, probed = step()[0], step()[0]
    assert exact > 0
    assert probed > 0
    assert all(any(p is q for q in model[0].parameters()) for p in optimizer._source._found)


def test_probe_warns_of_what_it_does_not_see(backend):
    block, head = nn.Linear(4, 4), nn.Linear(4, 2)
    optimizer = dk.DTOAdamW([*block.parameters(), *head.parameters()], gram=Probe([block, head]))
    out = head(checkpoint(block, torch.ones(3, 4, requires_grad=True), use_reentrant=True))
    with pytest.warns(UserWarning, match=r"2 of the 4 parameters of gram=Probe.* have no gradient; .*reentrant"):
        optimizer.backward([out.square().mean(), (out - 1).square().mean()])


@pytest.mark.parametrize("gram", ["exact", "overlap", "lag"])
def test_removed_parameters_are_in_no_product(backend, gram):
    """A group that goes between backward and step: its gradients count no more, whoever took their products."""
    grams = []
    for both in (True, False):
        a, b = (nn.Parameter(torch.full((n,), float(n))) for n in (3, 2))
        optimizer = dk.DTOSGD([{"params": [a]}, {"params": [b]}] if both else [b], lr=0.1, gram=gram)
        optimizer.backward([a.sum() + b.square().sum(), a.square().sum() + (b - 1).square().sum()])
        if both:
            del optimizer.param_groups[0]
        optimizer.step()
        grams.append(optimizer.balance.gram)
    assert torch.equal(*grams)


def test_weightings_under_ema_may_write_to_their_arguments(backend):
    def greedy(gram, losses):
        weights = losses / losses.sum()
        gram.zero_()
        losses.zero_()
        return weights

    w = nn.Parameter(torch.ones(2))
    optimizer = dk.DTOSGD([w], lr=0.1, weighting=greedy, gram=Ema(0.5))
    optimizer.backward([w.sum(), (2 * w).square().sum()])
    optimizer.step()
    assert not optimizer.balance.skipped
    assert optimizer.balance.gram.diagonal().all()


def test_backward_refuses_lag():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"^backward: gram is 'lag', but 'lag' measures while an optimizer's step"):
        dk.backward([w.sum()], [w], gram="lag")
    with pytest.raises(ValueError, match=r"^backward: gram is Every\(n=2, .*Lag\(\)\)\), but 'lag' measures"):
        dk.backward([w.sum()], [w], gram=Every(2, Ema(0.5, "lag")))
    assert w.grad is None


class NoGradient(torch.autograd.Function):
    """x + sum(y) that has no gradient for y, though y requires one."""

    @staticmethod
    def forward(ctx, x, y):
        return x + y.sum()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@each_source
def test_gradient_that_is_undefined(backend, source):
    """It is none: the same step as without the function."""
    models = [Student(), Student()]
    for model, apply in zip(models, (NoGradient.apply, lambda x, y: x + y.detach().sum()), strict=True):
        optimizer = dk.DTOAdamW(model.parameters(), lr=1e-2, gram=source(model))
        for step in range(4):
            x, y, z = batch(step)
            task, distill = model(x)
            task = apply(task, model.unused)
            optimizer.zero_grad()
            optimizer.backward({"task": (task - y).square().mean(), "distill": (distill - z).square().mean()})
            optimizer.step()
        assert not optimizer.skipped_steps
    assert_same(models[0].parameters(), models[1].parameters())


def test_large_gradients_are_finite_to_the_watch_of_lag():
    """Squares of 2^100 are beyond float32; the watch sums them in float64."""
    w = nn.Parameter(torch.full((3,), 2.0**10))
    optimizer = dk.DTOSGD([w], lr=0.0, rescale="none", gram="lag")  # else the step would be too long
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward([(w * 2.0**100).sum(), (w * 2.0**99).sum()])
        optimizer.step()
        assert not optimizer.balance.skipped
    assert optimizer.skipped_steps == 0
