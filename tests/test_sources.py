"""Where the Gram matrix comes from: what holds for every source, with several weightings and both optimizers."""

import copy
import io

import pytest
import torch
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels.sources import Ema, Every, Feature, Lag, Probe

from . import tolerances
from .oracle import (
    NoGradient,
    Student,
    assert_directions,
    balanced,
    batch,
    losses_of,
    nothing_with_gradient,
    of_many_reaches,
)
from .sources import (
    SOURCES,
    assert_same,
    copies,
    each_optimizer,
    each_source,
    each_weighting,
    state_of,
    train,
)


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
    """And one more parameter that all but the last reach."""
    reached, of_reached = of_many_reaches(K)
    early = nn.Parameter(torch.randn(9, dtype=torch.float64))

    def losses():
        *values, last = of_reached()
        return [v + (early - 2).square().sum() for v in values] + [last]

    params = [*reached, early]
    expected = balanced(losses(), params)
    optimizer = dk.DTOSGD(params, lr=1.0, rescale="none", gram=source)
    before = copies(params)
    optimizer.backward(losses())
    optimizer.step()
    moved = [b - p.detach() for b, p in zip(before, params, strict=True)]
    assert_directions([m if m.any() else None for m in moved], expected)


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
    with pytest.warns(UserWarning, match="the gradients of the last step are still there"):
        optimizer.backward(losses_of(model, batch(3)))
    optimizer.step()
    optimizer.zero_grad()
    losses = losses_of(model, batch())
    optimizer.backward(losses, retain_graph=True)
    losses["task"].backward()


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
