"""`Share` against audiocraft's balancer and VQGAN's weight, `TaskFirst` against its guarantees and TorchJD's PCD."""

import copy

import numpy as np
import pytest
import torch

import dtokd_kernels as dk
from dtokd_kernels.weighting import Share, TaskFirst

from .inputs import families, gram_of
from .oracle import Student, batch, losses_of

U = 2.0**-53
NO = torch.tensor(False)


def step(rule, gram, skipped=NO):
    weights = rule(gram, torch.ones(len(gram), dtype=torch.float64))
    rule.commit(skipped)
    return weights


def sequence(K, steps, seed=0):
    """Gradients [K, 40] that change from step to step, with norms that differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.linspace(-3, 3, K, dtype=torch.float64)
    return [
        scales[:, None] * (1 + t / 3) * torch.randn(K, 40, generator=generator, dtype=torch.float64)
        for t in range(steps)
    ]


# ---- Share -----------------------------------------------------------------------------------------


class Balancer:
    """The rule of EnCodec's loss balancer, on whole-batch gradients: plain code from its description.

    Norms are averaged with a decay and a correction for the start; each gradient is scaled to its ratio of the total.
    """

    def __init__(self, weights, total_norm=1.0, decay=0.999):
        self.weights, self.total_norm, self.decay = weights, total_norm, decay
        self.sums, self.fixes = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)

    def direction(self, gradients):
        total = 0
        for name, gradient in gradients.items():
            self.sums[name] = self.sums[name] * self.decay + gradient.norm().item()
            self.fixes[name] = self.fixes[name] * self.decay + 1
            average = self.sums[name] / self.fixes[name]
            ratio = self.weights[name] / sum(self.weights.values())
            total = total + ratio * self.total_norm / average * gradient
        return total


@pytest.mark.parametrize("K", [2, 3, 5])
def test_share_is_encodecs_balancer(K):
    names = [f"objective {i}" for i in range(K)]
    weights = {name: float(i + 1) for i, name in enumerate(names)}
    theirs = Balancer(weights)
    shares = {name: w / sum(weights.values()) for name, w in weights.items()}
    rule = Share(dict(reversed(shares.items())), beta=0.999, total=1.0)  # the order of a dict does not matter
    for J in sequence(K, 20):
        rule.expect(tuple(names))
        direction = step(rule, gram_of(J)) @ J
        expected = theirs.direction(dict(zip(names, J, strict=True)))
        assert (direction - expected).abs().max() <= 1e-13 * expected.abs().max()


def test_share_at_the_output_of_a_model_is_encodecs_balancer():
    """Gradients at the representation decide, one backward pass follows: as audiocraft's `backward(losses, output)`."""
    model, plain = Student(), Student()
    rule = Share({"task": 0.2, "distill": 0.8}, beta=0.9, total=1.0)
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, weighting=rule, rescale="none", gram=dk.sources.Feature())
    reference, theirs = torch.optim.SGD(plain.parameters(), lr=0.1), Balancer({"task": 1.0, "distill": 4.0}, 1.0, 0.9)
    for number in range(4):
        ends = []
        for student in (model, plain):
            x, y, z = batch(number)
            hidden = torch.tanh(student.trunk(x)) * student.scale
            out = student.head(hidden), student.projector(hidden)
            ends.append(({"task": (out[0] - y).square().mean(), "distill": (out[1] - z).square().mean()}, hidden))
        optimizer.backward(ends[0][0], features=ends[0][1])
        optimizer.step()
        optimizer.zero_grad()
        losses, hidden = ends[1]
        at_output = {n: torch.autograd.grad(v, hidden, retain_graph=True)[0] for n, v in losses.items()}
        expected = theirs.direction(at_output)
        # what reaches `hidden` is the same combination of the losses
        ratios = {n: theirs.fixes[n] / theirs.sums[n] * r for n, r in (("task", 0.2), ("distill", 0.8))}
        combined = sum(ratios[n] * v for n, v in losses.items())
        torch.testing.assert_close(torch.autograd.grad(combined, hidden, retain_graph=True)[0], expected)
        reference.zero_grad()
        combined.backward()
        reference.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_share_is_vqgans_adaptive_weight():
    """lambda = ||grad rec|| / ||grad gan|| at the last layer; the step descends rec + lambda gan."""
    rule = Share([1.0, 1.0], beta=0.0, primary=0)
    for J in sequence(2, 5):
        weight = J[0].norm() / J[1].norm()
        expected = J[0] + weight * J[1]
        assert (step(rule, gram_of(J)) @ J - expected).abs().max() <= 1e-14 * expected.abs().max()


@pytest.mark.parametrize("K", [1, 2, 3, 8])
def test_shares_of_the_norms(K):
    """In each step without an average; and of the averages with one."""
    shares = torch.arange(1, K + 1, dtype=torch.float64) / sum(range(1, K + 1))
    rule, averaging = Share(shares.tolist(), beta=0.0), Share(shares.tolist(), beta=0.9)
    norms = torch.zeros(K, dtype=torch.float64)
    count = 0.0
    for J in sequence(K, 8):
        gram = gram_of(J)
        weighted = step(rule, gram) * gram.diagonal().sqrt()
        torch.testing.assert_close(weighted / weighted.sum(), shares, rtol=1e-14, atol=0)
        torch.testing.assert_close(weighted.sum(), gram.diagonal().sqrt().sum(), rtol=1e-14, atol=0)
        norms, count = 0.9 * norms + gram.diagonal().sqrt(), 0.9 * count + 1
        weighted = step(averaging, gram) * norms / count
        torch.testing.assert_close(weighted / weighted.sum(), shares, rtol=1e-14, atol=0)


def test_share_of_an_objective_that_comes_and_goes():
    """Its average stays while it is away, and nothing is divided by zero before it comes."""
    rule = Share([0.5, 0.5], beta=0.5, total=1.0)
    assert step(rule, torch.diag(torch.tensor([4.0, 0.0]).double())).tolist() == [0.25, 0.0]
    assert step(rule, torch.diag(torch.tensor([4.0, 100.0]).double())).tolist() == [0.25, 0.05]
    before = copy.deepcopy(rule.state_dict())
    assert step(rule, torch.diag(torch.tensor([4.0, 0.0]).double())).tolist() == [0.25, 0.05]  # which multiplies zero
    assert rule.state_dict()["norms"][1] == before["norms"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, 0.6],), "sum to 1.1"),
        (([1.5, -0.5],), "positive number for each objective"),
        (([],), "positive number for each objective"),
        (([0.5, float("nan")],), "positive number for each objective"),
        (({"task": "half", "distill": 0.5},), "positive number for each objective"),
        (([0.5, 0.5], 1.0), "beta is 1.0"),
        (([0.5, 0.5], float("nan")), "beta is nan"),
        (([0.5, 0.5], 0.9, 0.0), "total is 0.0"),
        (([0.5, 0.5], 0.9, 1.0, 0), "pass one of them"),
        (([0.5, 0.5], 0.9, None, None, 0), "freeze_after is 0"),
        (([0.5, 0.5], 0.9, None, None, 2.5), "freeze_after is 2.5"),
        (({"task": 1.0, "distill": 1.0}, 0.9, None, "teacher"), "choose one of"),
    ],
)
def test_bad_shares(arguments, message):
    with pytest.raises(ValueError, match=message):
        Share(*arguments)


def test_shares_that_are_one_number():
    with pytest.raises(TypeError, match=r"Share: shares is 0\.5; pass a positive number for each objective"):
        Share(0.5)


def test_a_position_may_be_a_number_of_numpy():
    """A bool is none, though Python takes it for one."""
    gram = torch.tensor([[4.0, -1.0], [-1.0, 9.0]], dtype=torch.float64)
    for make in (TaskFirst, lambda primary: Share([1.0, 1.0], primary=primary)):
        assert torch.equal(make(np.int64(1))(gram, torch.ones(2)), make(1)(gram, torch.ones(2)))
        with pytest.raises(ValueError, match="primary is True, but the objectives are 2 without names"):
            make(True)(gram, torch.ones(2))


@pytest.mark.parametrize(
    "rule",
    [
        Share({"task": 0.5, "teacher": 0.5}),
        Share([0.25, 0.25, 0.5]),
        Share([1.0, 1.0], primary="teacher"),
        Share([1.0, 1.0], primary=2),
        TaskFirst("teacher"),
        TaskFirst(2),
        TaskFirst(-1),
    ],
    ids=str,
)
def test_objectives_that_are_not_there(rule):
    """Refused in `backward`, before anything has changed."""
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), weighting=rule)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"task.*distill"):
        optimizer.backward(losses_of(model, batch()))
    assert optimizer.state_dict() == before
    with pytest.raises(ValueError, match=r"Share|TaskFirst"):
        dk.balance(torch.eye(2), [1.0, 1.0], rule)


@pytest.mark.parametrize(
    "source", ["exact", "overlap", "lag", "probe", dk.sources.Every(2), dk.sources.Ema(0.5)], ids=str
)
@pytest.mark.parametrize("make", [dk.DTOAdamW, dk.DTOSGD], ids=["adamw", "sgd"])
def test_frozen_shares_take_one_backward_pass(backend, make, source):
    """Its weights are constants, and a run that goes on from a state ends with the same bits."""

    def start():
        model = Student()
        rule = Share({"task": 0.75, "distill": 0.25}, beta=0.5, freeze_after=4)
        return model, make(model.parameters(), lr=1e-2, weighting=rule, gram=copy.deepcopy(source))

    def train(model, optimizer, steps):
        weights = []
        for number in steps:
            passes = []
            handle = model.trunk.weight.register_hook(lambda g, passes=passes: passes.append(1))
            for part in zip(*(t.chunk(2) for t in batch(number)), strict=True):
                optimizer.backward(losses_of(model, part), share=0.5)
            handle.remove()
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.weighting.frozen is (number >= 3)
            if number >= 4:
                assert len(passes) == 2  # one for each part
            weights.append(optimizer.balance.weights)
        return weights

    model, optimizer = start()
    weights = train(model, optimizer, range(8))
    assert all(torch.equal(w, weights[4]) for w in weights[5:])
    assert not torch.equal(weights[0], weights[3])
    for stop in (2, 4, 6):
        first, before = start()
        train(first, before, range(stop))
        again, after = start()
        again.load_state_dict(first.state_dict())
        after.load_state_dict(before.state_dict())
        train(again, after, range(stop, 8))
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(p, q)


def test_shares_are_not_frozen_before_they_are_measured():
    """Steps that were skipped measured nothing; nor did those without one of the gradients."""
    rule = Share([0.5, 0.5], freeze_after=2)
    for _ in range(4):
        step(rule, torch.full((2, 2), torch.nan, dtype=torch.float64), torch.tensor(True))
        assert not rule.frozen
    step(rule, torch.diag(torch.tensor([4.0, 0.0]).double()))
    assert not rule.frozen
    step(rule, torch.diag(torch.tensor([4.0, 1.0]).double()))
    assert rule.frozen
    again = Share([0.5, 0.5], freeze_after=2)
    again.load_state_dict(rule.state_dict())
    assert again.frozen


# ---- TaskFirst -------------------------------------------------------------------------------------


def gradients(K):
    return {**families(K, 0), **{f"random {s}": families(K, s)["random"] for s in range(1, 6)}}


@pytest.mark.parametrize("K", [1, 2, 3, 5, 8])
def test_cosine_gate_never_slows_the_primary_objective(K):
    for p in range(K):
        for J in gradients(K).values():
            gram = gram_of(J)
            weights = step(TaskFirst(p), gram)
            if gram[p, p] == 0:
                assert (weights == 0).all()
                continue
            assert weights[p] == 1
            progress = gram[p] @ weights
            assert progress >= gram[p, p] * (1 - 8 * K * U)
            against = (gram[p] < 0) | (gram.diagonal() == 0)
            assert (weights[against] == 0).all()
            assert (weights[~against] == 1).all()


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_priority_constrained_descent_is_torchjds(K, tau):
    from torchjd.aggregation import PCDWeighting

    for seed in range(6):
        theirs, rule = PCDWeighting(tau, beta=0.9, eps=0.0), TaskFirst(0, "pcd", tau=tau, beta=0.9)
        for J in sequence(K, 4, seed):
            gram = gram_of(J)
            direction, expected = step(rule, gram) @ J, theirs(gram) @ J
            assert (direction - expected).norm() <= 1e-7 * expected.norm()


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("K", [2, 3, 5, 8])
def test_priority_constrained_descent_guarantees_its_share(K, tau):
    for p in (0, K - 1):
        for name, J in gradients(K).items():
            gram = gram_of(J)
            if (gram.diagonal() == 0).any():
                continue
            unit = J / J.norm(dim=1)[:, None]
            weights = step(TaskFirst(p, "pcd", tau=tau, beta=0.0), gram)
            direction = weights @ J
            if direction.norm() == 0:
                continue
            assert abs(direction.norm() / J[p].norm() - 1) <= 1e-6, name
            alone = torch.nn.functional.one_hot(torch.tensor(p), K).double()
            if torch.equal(weights, alone):
                continue  # no constraint is active, or they exclude each other
            nearest = direction / weights[p] / J[p].norm()  # d' of unit gradients
            assert (torch.cat([unit[:p], unit[p + 1 :]]) @ nearest >= tau - 1e-6).all(), name
            assert (weights >= 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_equal_gradients_share_and_the_order_of_the_others_does_not_matter(seed):
    J = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    J[3] = J[2]

    def solve(order):
        rule = TaskFirst(0, "pcd", tau=0.9)
        return rule(J[order] @ J[order].T, torch.ones(4, dtype=torch.float64))

    weights = solve([0, 1, 2, 3])
    assert weights[2] == weights[3] > 0
    for order in ([0, 2, 1, 3], [0, 3, 2, 1]):
        torch.testing.assert_close(solve(order), weights[order], rtol=1e-9, atol=1e-9)


def test_patience_ends_what_works_against_the_task():
    """After so many steps in a row with a negative average of the cosine, for good; the state goes on."""
    helps, hurts = torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double(), torch.tensor([[1.0, -0.5], [-0.5, 1.0]]).double()
    rule = TaskFirst(0, beta=0.5, patience=3)
    grams = [helps, hurts, hurts, hurts, helps, helps, hurts, hurts, hurts, hurts, helps, helps, helps]
    second = [step(rule, gram)[1].item() for gram in grams]
    # averages: .5, -.17, -.36, -.43 (3 negative: closed)
    assert second == [1, 0, 0, 0, *[0] * 9]
    again = TaskFirst(0, beta=0.5, patience=3)
    again.load_state_dict(rule.state_dict())
    assert step(again, helps)[1] == 0
    patient = TaskFirst(0, beta=0.5, patience=4)
    assert [step(patient, gram)[1].item() for gram in grams[:6]] == [1, 0, 0, 0, 1, 1]
    skipped = TaskFirst(0, beta=0.5, patience=1)
    step(skipped, hurts, torch.tensor(True))
    assert step(skipped, helps)[1] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "first"}, "rule is 'first'"),
        ({"ratio": -1.0}, "ratio is -1.0"),
        ({"ratio": float("inf")}, "ratio is inf"),
        ({"tau": 1.5}, "tau is 1.5"),
        ({"tau": float("nan")}, "tau is nan"),
        ({"beta": 1}, "beta is 1"),
        ({"beta": "0.9"}, "beta is '0.9'"),
        ({"patience": 0}, "patience is 0"),
        ({"patience": 2.5}, "patience is 2.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TaskFirst(**options)
