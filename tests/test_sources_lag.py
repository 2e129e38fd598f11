"""The weights of the step before: the Gram matrix is measured while the parameters are updated."""

import pytest
import torch
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels import backends
from dtokd_kernels.sources import Ema, Every
from dtokd_kernels.types import Options, Role

from . import tolerances
from .inputs import CHUNK, each_dtype, gradients
from .oracle import Student, batch, losses_of, nothing_with_gradient
from .sources import copies, each_weighting, train, weights_by
from .updates import Update, gradient_rows, measure_and_run, run


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


@pytest.mark.parametrize("weighting", [dk.weighting.DTO(), dk.weighting.UPGrad()], ids=["dto", "upgrad"])
@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_balance_by_the_matrices_of_the_step_before(backend, K, weighting):
    """The bits of three calls: weights by the former losses, the balance with these, and a look at the squares."""
    module = backends.select(torch.device("cpu"))
    generator = torch.Generator().manual_seed(K)
    factors = torch.randn(3, K, 7, generator=generator, dtype=torch.float64)
    grams, (before, losses) = factors @ factors.mT, 0.5 + torch.rand(2, K, generator=generator, dtype=torch.float64)
    options = Options(weighting, max_norm=0.5, limit=2.0**60)
    nan, inf, huge = float("nan"), float("inf"), 2.0**140
    # all of the first are skipped; private gradients of a tiny loss are what is too long, where there are any
    for first, roles, skipped in (
        (2.0, 7, False), (nan, 7, True), (inf, 7, True), (huge, 7, True), (0.0, 7, K == 1), (2.0, 1, False),
    ):  # fmt: skip
        squares = torch.full((K,), 3.0, dtype=torch.float64)
        squares[0] = first
        masked = grams * ((squares != 0)[:, None] & (squares != 0)[None, :])
        weights = module.balance(masked, before, options).weights
        expected = module.balance(masked, losses, options, weights)
        record = module.balance_before(grams, before, losses, squares, roles, options)
        assert record.skipped == skipped
        for name in ("weights", "table", "norms", "norm", "cosine", "vertex"):
            assert torch.equal(getattr(record, name), getattr(expected, name)), (name, first)


def test_only_roles_that_are_updated_bound_a_step(backend):
    """A tiny loss makes the coefficient of private parameters large: that skips the step only if there are any."""
    module = backends.select(torch.device("cpu"))
    grams = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
    grams[Role.SHARED, 0, 0] = 0.0
    losses = torch.tensor([1e-8, 1.0], dtype=torch.float64)
    squares = torch.full((2,), 2.0**80, dtype=torch.float64)
    options = Options(dk.weighting.DTO(), limit=2.0**60)
    for roles, skipped in ((0b101, False), (0b010, True), (0b111, True)):
        record = module.balance_before(grams, torch.ones(2).double(), losses, squares, roles, options)
        assert record.skipped == skipped, roles


def test_backward_refuses_lag():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"^backward: gram is 'lag', but 'lag' measures while an optimizer's step"):
        dk.backward([w.sum()], [w], gram="lag")
    with pytest.raises(ValueError, match=r"^backward: gram is Every\(n=2, .*Lag\(\)\)\), but 'lag' measures"):
        dk.backward([w.sum()], [w], gram=Every(2, Ema(0.5, "lag")))
    assert w.grad is None


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


def test_an_objective_that_was_away_is_weighed_at_once(backend):
    """Alone it has weight 1 in each step, as the other one has in the steps between; nothing is skipped."""
    trained = []
    for source in ("exact", "lag"):
        w = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
        optimizer = dk.DTOSGD([w], lr=0.1, gram=source)
        for step in range(4):
            away = 0 * w.sum() + 3
            optimizer.zero_grad()
            optimizer.backward([away if step % 2 else w.square().sum(), (w - 1).square().sum() if step % 2 else away])
            optimizer.step()
            assert optimizer.balance.weights.tolist() == [1 - step % 2, step % 2]
        assert optimizer.skipped_steps == 0
        trained.append(w)
    assert torch.equal(*trained)


@pytest.mark.parametrize("parts", [1, 3])
def test_an_objective_that_comes_later_is_weighed_by_its_length(backend, parts):
    w = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    optimizer = dk.DTOSGD([w], lr=0.0, weighting=dk.weighting.DTO(log_gradients=False), gram="lag")
    for later in (0.0, 1.0):
        optimizer.zero_grad()
        for _ in range(parts):
            optimizer.backward([w.sum(), later * 3 * w.sum()], share=1 / parts)
        optimizer.step()
    # squares of 2 and 18, taken as orthogonal
    assert (
        optimizer.balance.weights - torch.tensor([0.9, 0.1], dtype=torch.float64)
    ).abs().max() <= 8 * tolerances.REORDERED


def test_an_objective_whose_gradient_was_private_is_weighed_at_once(backend):
    """In the first step distillation stops at its own layer, and the trunk is the task's alone."""
    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, gram="lag")
    x, y, z = batch()
    out, _ = model(x)
    detached = model.projector(torch.tanh(model.trunk(x)).detach())
    optimizer.backward({"task": (out - y).square().mean(), "distill": (detached - z).square().mean()})
    optimizer.step()
    before = model.trunk.weight.detach().clone()
    train(model, optimizer, 1)
    assert (optimizer.balance.weights > 0).all()
    assert not torch.equal(model.trunk.weight, before)
