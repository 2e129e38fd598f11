"""Gram matrices of several steps: measured every n steps (`Every`), or averaged (`Ema`)."""

import copy

import pytest
import torch
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels import backends
from dtokd_kernels.sources import Ema, Every, Probe

from . import tolerances
from .oracle import Student, batch, losses_of
from .sources import each_weighting, full_passes, train, weights_by

EPS = torch.finfo(torch.float64).eps


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


def test_every_forgets_a_measurement_that_no_step_has_followed(backend):
    """As when a run is taken back to its last state between `backward` and `step`."""
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), gram=Every(3, Probe(model.trunk)))
    train(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 2)
    optimizer.zero_grad()
    optimizer.backward(losses_of(model, batch(3)))  # measures
    optimizer.load_state_dict(state)
    optimizer.zero_grad()
    train(model, optimizer, 1)
    assert optimizer.state_dict()["gram"]["taken"] == 2


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
