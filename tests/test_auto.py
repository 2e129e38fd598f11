"""`Auto` chooses by the half of the measurements that did not make the weights, and freezes."""

import copy

import pytest
import torch
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels.weighting import Auto

NO = torch.tensor(False)
N = 4000
MEAN = torch.randn(N, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def gram_of(*rows):
    J = torch.stack(rows)
    return J @ J.T


def weights_of(rule, losses=(1.0, 1.0)):
    K = len(losses)
    weights = rule(torch.eye(K, dtype=torch.float64), torch.tensor(losses, dtype=torch.float64))
    rule.commit(NO)
    return weights


def noise(generator, size=1.0):
    return size * torch.randn(N, generator=generator, dtype=torch.float64)


def chosen(make, window=10, losses=(1.0, 1.0)):
    """The rule after its window of measurements of the gradients that `make` returns for a generator."""
    generator = torch.Generator().manual_seed(0)
    rule = Auto(window=window)
    for _ in range(window):
        weights_of(rule, losses)
        assert rule.report() is None
        rule.observe(gram_of(*make(generator)))
    return rule


def test_it_takes_the_primary_alone_where_the_other_works_against_it():
    def make(generator):
        return MEAN + noise(generator), 3 * (noise(generator) - MEAN / 2), MEAN + noise(generator)

    rule = chosen(make)
    assert rule.report().startswith("auto: the primary objective alone (0 1, 1 0)")
    assert weights_of(rule).tolist() == [1, 0]


def test_it_takes_equal_shares_of_equally_good_gradients():
    def make(generator):
        return MEAN + noise(generator), 50 * (MEAN + noise(generator)), MEAN + noise(generator)

    rule = chosen(make, window=20)
    weights = weights_of(rule)
    assert float(weights[0] / weights[1]) == pytest.approx(50, rel=0.1)
    assert "auto: equal shares" in rule.report() or "auto: the regression" in rule.report()


def test_it_takes_more_of_a_gradient_without_noise():
    def make(generator):
        return 0.02 * MEAN + noise(generator, 3.0), 10 * MEAN, MEAN + noise(generator)

    rule = chosen(make, losses=(5.0, 0.01))
    gains = rule.state_dict()["gains"][0]
    assert int(rule.state_dict()["choice"]) == int(gains.argmax())
    assert gains[2] > gains[0]
    assert weights_of(rule)[1] > 0


@pytest.mark.parametrize("seed", range(5))
def test_weights_and_gains_are_those_of_plain_code(seed):
    """K = 3, window 6: weights from the first three measurements, judged by the others."""
    generator = torch.Generator().manual_seed(seed)
    rule, grams, losses = Auto(1, window=6), [], (2.0, 1.0, 4.0)
    for _ in range(6):
        weights_of(rule, losses)
        shared = noise(generator)
        J = torch.stack([noise(generator, s) + shared for s in (1.0, 2.0, 0.5)] + [noise(generator) + shared])
        grams.append(J @ J.T / (J[1] @ J[1]))
        rule.observe(J @ J.T * 7)
    first, second, whole = sum(grams[:3]), sum(grams[3:]), sum(grams)

    def candidates(G):
        lengths = G.diagonal()[:3].sqrt()
        regression = torch.linalg.solve(G[:3, :3], G[:3, 3])
        assert (regression > 0).all()
        rows = [torch.tensor([0, 1.0, 0]), 1 / lengths, 1 / torch.tensor(losses), regression]
        return [w.double() * lengths[1] / (w.double() @ G[:3, :3] @ w.double()).sqrt() for w in rows]

    gains = [float(w @ second[:3, 3] / (w @ second[:3, :3] @ w).sqrt()) for w in candidates(first)]
    assert rule.state_dict()["gains"][0].tolist() == pytest.approx(gains, rel=1e-6)
    best = max(range(4), key=lambda i: gains[i])
    torch.testing.assert_close(weights_of(rule, losses), candidates(whole)[best], rtol=1e-6, atol=0)


def test_it_is_frozen_then_and_measures_no_more():
    model = nn.Linear(4, 3)
    optimizer = dk.DTOAdamW(model.parameters(), lr=1e-2, weighting=Auto("task", window=2))
    generator = torch.Generator().manual_seed(0)
    frozen = None
    for _ in range(5):
        out = model(torch.randn(8, 4, generator=generator))
        losses = {"task": (out - 1).square().mean(), "distill": out.square().mean()}
        held_out = (model(torch.randn(8, 4, generator=generator)) - 1).square().mean()
        dk.measure_held_out(optimizer, losses, held_out)
        optimizer.backward(losses)
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.weighting.done:
            weights = optimizer.weighting.state_dict()["weights"]
            assert frozen is None or torch.equal(frozen, weights)
            frozen = weights
    assert optimizer.weighting.state_dict()["measurements"] == 2
    assert "task" in optimizer.weighting.report()


@pytest.mark.parametrize(
    ("left_out", "choice"), [({3}, 3), ({5}, 3), ({1, 4, 5}, 3), ({3, 4, 5}, 0), ({0, 1, 2}, 0), (set(range(6)), 0)]
)
def test_it_chooses_also_where_measurements_are_left_out(left_out, choice):
    """Also the last one, after which none would make up for it."""
    gram = torch.tensor([[1.0, 0.1, 0.5], [0.1, 2.0, 0.9], [0.5, 0.9, 1.0]], dtype=torch.float64)
    rule, same = Auto(window=6), Auto(window=2)
    for number in range(6):
        rule.observe(gram * (torch.inf if number in left_out else 1))
    for _ in range(2):
        same.observe(gram)
    assert int(rule.state_dict()["choice"]) == choice
    assert "nan" not in rule.report()
    expected = weights_of(same) if choice else torch.tensor([1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(weights_of(rule), expected)


def test_gradients_that_cancel_have_no_equal_shares():
    """Their sum is rounding, which is not to be stretched to the primary gradient's length."""
    generator = torch.Generator().manual_seed(0)
    for size in (0.3, 1.3, 2.3):
        gradient = noise(generator).float()
        rule = Auto(window=2)
        for _ in range(2):
            rule.observe(dk.gram([[gradient], [-size * gradient], [gradient + noise(generator).float()]]))
            weights = weights_of(rule)  # of d = w_0 g - size w_1 g
            assert float(weights @ torch.tensor([1, -size], dtype=torch.float64)) == pytest.approx(1)
            assert weights.max() < 2


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_copy_goes_on_to_the_bit(at):
    def measure(rule, number):
        weights_of(rule, (1.0, 2.0))
        generator = torch.Generator().manual_seed(number)
        shared = noise(generator)
        rule.observe(gram_of(*(noise(generator) + shared for _ in range(3))))

    whole = Auto(window=6)
    for number in range(6):
        if number == at:
            state = copy.deepcopy(whole.state_dict())
        measure(whole, number)
    resumed = Auto(window=6)
    resumed.load_state_dict(state)
    for number in range(at, 6):
        measure(resumed, number)
    assert resumed.report() == whole.report()
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_refusals():
    for window in (0, 1, -3, 2.5, None, True):
        with pytest.raises(ValueError, match="window"):
            Auto(window=window)
    with pytest.raises(ValueError, match="choose one of them"):
        Auto("task").expect(("a", "b"))
