"""`HeldOut` against a regression by non-negative least squares, and what it guarantees; `measure_held_out`."""

import copy
import json

import pytest
import torch
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels.weighting import HeldOut

from .inputs import gram_of
from .oracle import Student, batch, losses_of


def random(K, seed=0, n=60):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, generator=generator, dtype=torch.float64)
    return shared + torch.randn(K + 1, n, generator=generator, dtype=torch.float64)


def regression(G, b, steps=200_000):
    """argmin over w >= 0 of w^T G w / 2 - b^T w, by projected gradients: plain code."""
    w = torch.zeros_like(b)
    rate = 1 / torch.linalg.eigvalsh(G).max()
    for _ in range(steps):
        new = (w - rate * (G @ w - b)).clamp(min=0)
        if torch.equal(new, w):
            break
        w = new
    return w


def weights_of(rule, K):
    gram = torch.eye(K, dtype=torch.float64)
    return rule(gram, torch.ones(K, dtype=torch.float64))


@pytest.mark.parametrize("K", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("primary", [0, -1], ids=["first", "last"])
def test_weights_are_those_of_the_regression_at_the_primary_length(K, primary):
    rule = HeldOut(primary % K, beta=0.7)
    G, b = torch.zeros(K, K, dtype=torch.float64), torch.zeros(K, dtype=torch.float64)
    for t in range(4):
        gram = gram_of(random(K, seed=10 * K + t) * (1 + t))  # in other units from time to time
        rule.observe(gram)
        unit = max(gram[primary % K, primary % K], gram[K, K])
        G = 0.7 * G + gram[:K, :K] / unit
        b = 0.7 * b + gram[:K, K] / unit
    w = regression(G, b)
    assert (w > 0).any()
    w = w * (G[primary % K, primary % K] / (w @ G @ w)).sqrt()
    torch.testing.assert_close(weights_of(rule, K), w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_points_more_towards_the_held_out_gradient(seed):
    J = random(3, seed)
    J[2] -= 1.5 * J[3]  # one that works against it
    rule = HeldOut(beta=0.0)
    rule.observe(gram_of(J))
    d = weights_of(rule, 3) @ J[:3]
    cosine = torch.cosine_similarity(d, J[3], dim=0)
    others = torch.rand(2000, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert cosine >= torch.cosine_similarity(others @ J[:3], J[3][None], dim=1).max() - 1e-12
    assert d.norm() == pytest.approx(float(J[0].norm()), rel=1e-12)


def test_an_objective_that_works_against_it_fades_out_and_comes_back():
    rule = HeldOut(beta=0.5)
    J = random(2, n=4000)
    rule.observe(gram_of(J))
    assert (weights_of(rule, 2) > 0).all()
    for _ in range(6):
        rule.observe(gram_of(torch.stack([J[0], J[1] - 3 * J[2], J[2]])))
    assert weights_of(rule, 2).tolist() == pytest.approx([1.0, 0.0])
    for _ in range(8):
        rule.observe(gram_of(J))
    assert weights_of(rule, 2)[1] > 0


def test_a_noisy_gradient_has_the_smaller_weight():
    """Two objectives with one mean gradient: the weights are in inverse proportion to the variances."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4000, generator=generator, dtype=torch.float64)

    def noise(size):
        return size * torch.randn(4000, generator=generator, dtype=torch.float64)

    rule = HeldOut(beta=0.999)
    for _ in range(300):
        rule.observe(gram_of(torch.stack([mean + noise(2.0), mean + noise(1.0), mean + noise(2.0)])))
    weights = weights_of(rule, 2)
    assert float(weights[1] / weights[0]) == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("rank", [2, 3, 6])
@pytest.mark.parametrize("seed", range(4))
def test_equal_gradients_share_and_the_order_of_the_others_does_not_matter(seed, rank):
    """Also where the gradients depend on one another, so that many weights have one direction."""
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(5, rank, generator=generator, dtype=torch.float64)
    J[3] = J[2]
    J[4] = J[:4].sum(0) + 0.1 * J[4]  # held out

    def solve(order):
        rule = HeldOut(0)
        rule.observe(gram_of(J[[*order, 4]]))
        return weights_of(rule, 4)

    weights = solve([0, 1, 2, 3])
    assert weights[2] == weights[3]
    assert weights[2] > 0 or rank == 2  # others may make it up
    for order in ([0, 2, 1, 3], [0, 3, 2, 1]):
        torch.testing.assert_close(solve(order), weights[order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_units_of_the_losses_do_not_matter(factor):
    J = random(2)
    plain, scaled = HeldOut(), HeldOut()
    for t in range(3):
        plain.observe(gram_of(J + t))
        scaled.observe(gram_of((J + t) * torch.tensor([1.0, factor, 1.0], dtype=torch.float64)[:, None]))
    expected = weights_of(plain, 2) / torch.tensor([1.0, factor], dtype=torch.float64)
    torch.testing.assert_close(weights_of(scaled, 2), expected, rtol=1e-9, atol=0)


def test_a_batch_that_the_model_fits_already_does_not_rule():
    rule = HeldOut()
    for t in range(20):
        rule.observe(gram_of(random(2, seed=t) + 1))
    before = weights_of(rule, 2)
    J = random(2, seed=20) + 1
    J[0] /= 1000
    rule.observe(gram_of(J))
    # one of the measurements, whose sums are those of 13 (0.95^t): the weights change by a few times 1/13 at most
    torch.testing.assert_close(weights_of(rule, 2), before, rtol=0.2, atol=0)


def test_where_nothing_helps_the_primary_objective_is_alone():
    J = random(2)
    rule = HeldOut(1)
    rule.observe(gram_of(torch.stack([J[0], J[1], -J[0] - J[1]])))
    assert weights_of(rule, 2).tolist() == [0, 1]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_measurement_that_is_not_finite_changes_nothing(wrong):
    J = random(2)
    rule = HeldOut()
    rule.observe(gram_of(J))
    before = copy.deepcopy(rule.state_dict())
    J[1, 3] = wrong
    rule.observe(gram_of(J))
    after = rule.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in ("gram", "products", "weights"))
    rule.observe(torch.zeros(3, 3, dtype=torch.float64))  # a primary gradient of zero is no measure
    assert torch.equal(before["gram"], rule.state_dict()["gram"])


def test_without_a_measurement_it_warns_once():
    rule = HeldOut("b")
    rule.expect(("a", "b"))

    def steps(rule, count):
        for _ in range(count):
            assert weights_of(rule, 2).tolist() == [0, 1]
            rule.commit(torch.tensor(False))

    steps(rule, 99)
    with pytest.warns(UserWarning, match="measure_held_out"):
        steps(rule, 1)
    steps(rule, 200)  # warnings are errors here
    fresh = HeldOut(1)
    fresh.observe(gram_of(-random(2)[[1, 0, 2]]))
    resumed = HeldOut(1)
    resumed.load_state_dict(fresh.state_dict())
    for _ in range(200):
        assert torch.equal(weights_of(resumed, 2), weights_of(fresh, 2))
        resumed.commit(torch.tensor(False))


# ---- measuring -------------------------------------------------------------------------------------


def shared(model):
    return [*model.trunk.parameters(), model.scale]


def task(out):
    return (out - 1).square().mean()


def plain_gram(model, losses, held_out, roots=None):
    params = shared(model)
    rows = []
    for loss in (*losses.values(), held_out):
        grads = torch.autograd.grad(loss, params, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    J = torch.stack(rows)
    return gram_of(J if roots is None else J * roots)


def measured(rule):
    gram, products = rule.state_dict()["gram"], rule.state_dict()["products"]
    return torch.cat([gram, products[:, None]], 1)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (dk.DTOAdamW, {}),
        (dk.DTOAdamW, {"amsgrad": True, "betas": (0.9, 0.5)}),
        (dk.DTOSGD, {}),
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"amsgrad": True, "betas": (0.9, 0.5)}),
        (torch.optim.SGD, {}),
    ],
)
def test_it_measures_what_plain_code_does_in_the_metric_of_the_state(make, options):
    model = Student(torch.float32)
    rule = HeldOut("task")
    ours = make in (dk.DTOAdamW, dk.DTOSGD)
    optimizer = make(model.parameters(), lr=1e-2, **options, **({"weighting": rule} if ours else {}))
    moment, beta2 = ("max_exp_avg_sq", 0.5) if options else ("exp_avg_sq", 0.999)
    expected = 0
    for step in range(3):
        losses = losses_of(model, batch(step, torch.float32))
        held_out = losses_of(model, batch(50 + step, torch.float32))["task"]
        roots = None
        if "AdamW" in make.__name__ and step:
            roots = torch.cat(
                [
                    ((optimizer.state[p][moment].double() / (1 - beta2**step)).sqrt() + 1e-8).flatten()
                    for p in shared(model)
                ]
            ).rsqrt()
        gram = plain_gram(model, losses, held_out, roots)
        expected = 0.95 * expected + gram[:2] / max(gram[0, 0], gram[2, 2])
        dk.measure_held_out(optimizer, losses, held_out, weighting=None if ours else rule)
        torch.testing.assert_close(measured(rule), expected, rtol=1e-5, atol=1e-6)
        assert all(p.grad is None for p in model.parameters())
        if ours:
            optimizer.backward(losses)
        else:
            dk.backward(losses, model.parameters(), rule)
        optimizer.step()
        optimizer.zero_grad()


def test_a_first_step_that_was_skipped_is_no_metric():
    """On a GPU, and where updates are tried on copies, it leaves moments of zero and no step."""
    model = Student(torch.float32)
    rule = HeldOut("task")
    optimizer = dk.DTOAdamW(model.parameters(), weighting=rule)
    for p in model.parameters():
        optimizer.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")} | {
            "step": torch.tensor(0.0)
        }
    losses = losses_of(model, batch(0, torch.float32))
    held_out = losses_of(model, batch(50, torch.float32))["task"]
    gram = plain_gram(model, losses, held_out)
    dk.measure_held_out(optimizer, losses, held_out)
    torch.testing.assert_close(measured(rule), gram[:2] / max(gram[0, 0], gram[2, 2]), rtol=1e-5, atol=1e-6)


def test_a_step_takes_the_weighted_sum_in_one_pass():
    model, plain = Student(), Student()
    plain.load_state_dict(model.state_dict())
    rule = HeldOut("task")
    a = dk.DTOAdamW(model.parameters(), lr=1e-2, weighting=rule)
    b = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(4):
        losses = losses_of(model, batch(step))
        if step % 2 == 0:
            dk.measure_held_out(a, losses, losses_of(model, batch(90 + step))["task"])
        weights = rule.state_dict()["weights"]
        a.backward(losses)
        a.step()
        assert torch.equal(a.balance.weights, weights)
        assert torch.equal(rule.state_dict()["weights"], weights)
        b.zero_grad()
        torch.autograd.backward(
            [w * loss for w, loss in zip(weights, losses_of(plain, batch(step)).values(), strict=True)]
        )
        b.step()
        a.zero_grad()
    for p, q in zip(shared(model), shared(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_a_run_resumes_bit_for_bit():
    def steps(model, optimizer, numbers):
        for step in numbers:
            losses = losses_of(model, batch(step))
            if step % 2 == 0:
                dk.measure_held_out(optimizer, losses, losses_of(model, batch(90 + step))["task"])
            optimizer.backward(losses)
            optimizer.step()
            optimizer.zero_grad()

    def new():
        torch.manual_seed(0)
        model = Student()
        return model, dk.DTOAdamW(model.parameters(), lr=1e-2, weighting=HeldOut("task"))

    whole, optimizer = new()
    steps(whole, optimizer, range(7))
    model, optimizer = new()
    steps(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer = new()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    steps(model, optimizer, range(3, 7))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters(), strict=True))


def test_refusals():
    model = nn.Linear(3, 2)
    other = nn.Linear(3, 2)
    optimizer = dk.DTOAdamW(model.parameters(), weighting=HeldOut("task"))
    out = model(torch.ones(4, 3))
    losses = {"task": task(out), "distill": out.square().mean()}
    before = optimizer.weighting.state_dict()

    def refused(error, match, losses=losses, held_out=None, optimizer=optimizer, **kwargs):
        with pytest.raises(error, match=match):
            dk.measure_held_out(
                optimizer, losses, task(model(torch.ones(4, 3))) if held_out is None else held_out, **kwargs
            )
        assert optimizer.weighting.state_dict() == before

    eight = {"task": losses["task"], **{str(i): losses["distill"] for i in range(7)}}
    refused(ValueError, "at most 7", losses=eight)
    refused(ValueError, "held_out is nan", held_out=task(out) * float("nan"))
    refused(ValueError, "no parameter", held_out=task(other(torch.ones(4, 3))))
    refused(ValueError, "held_out needs no gradient", held_out=torch.ones(()))
    refused(ValueError, r"held_out has shape \(4, 2\)", held_out=out)
    refused(ValueError, "choose one of them", losses={"a": losses["task"], "b": losses["distill"]})
    with pytest.raises(TypeError, match="pass the HeldOut or Auto"):
        dk.measure_held_out(dk.DTOAdamW(model.parameters()), losses, task(out))
    with pytest.raises(TypeError, match="pass the HeldOut or Auto"):
        dk.measure_held_out(torch.optim.SGD(model.parameters(), lr=0.1), losses, task(out))
    for beta in (-0.1, 1.0, "x", float("nan")):
        with pytest.raises(ValueError, match="beta"):
            HeldOut(beta=beta)


def test_the_scale_of_a_scaler_cancels():
    model = Student(torch.float32)
    plain, scaled = HeldOut("task"), HeldOut("task")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    losses = losses_of(model, batch(0, torch.float32))
    for rule, given in ((plain, None), (scaled, scaler)):
        held_out = losses_of(model, batch(9, torch.float32))["task"]
        dk.measure_held_out(optimizer, losses, held_out, weighting=rule, scaler=given)
    torch.testing.assert_close(measured(scaled), measured(plain), rtol=1e-5, atol=1e-6)


def test_ranks_average_gradients_that_autograd_has_made_of_one_number():
    """All elements of the gradient of a sum lie at one place, which cannot be written to."""
    w = nn.Parameter(torch.tensor([1.0, 2.0, -1.0]))
    found = []
    for on_ranks in (False, True):
        if on_ranks:
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            rule = HeldOut(0)
            losses, held_out = [w.square().sum(), w.sum()], (w - 1.5).square().sum()
            dk.measure_held_out(torch.optim.SGD([w], lr=0.1), losses, held_out, weighting=rule)
            found.append(measured(rule))
        finally:
            if on_ranks:
                torch.distributed.destroy_process_group()
    assert torch.equal(*found)


def one_of_two(rank, folder):
    """A rank with its half of each batch."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = Student()
    rule = HeldOut("task")
    halves = [[part[4 * rank : 4 * rank + 4] for part in batch(step)] for step in (0, 9)]
    losses, held_out = (losses_of(model, half) for half in halves)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dk.measure_held_out(optimizer, losses, held_out["task"], weighting=rule)
    before = measured(rule)
    bad = held_out["task"] * (torch.nan if rank else 1)  # left out by both; an error of one would let the other wait
    dk.measure_held_out(optimizer, losses, bad, weighting=rule)
    assert torch.equal(measured(rule), before)
    (folder / f"{rank}.json").write_text(json.dumps(before.tolist()))
    torch.distributed.destroy_process_group()


def test_two_ranks_measure_what_one_process_does_on_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second  # the same bits
    model = Student()
    rule = HeldOut("task")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dk.measure_held_out(optimizer, losses_of(model, batch(0)), losses_of(model, batch(9))["task"], weighting=rule)
    # sums of halves instead of wholes: a few roundings of float64
    torch.testing.assert_close(torch.tensor(first, dtype=torch.float64), measured(rule), rtol=1e-12, atol=1e-14)
