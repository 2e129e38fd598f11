"""`Reachable` against DTO on shifted losses, and what it estimates; preferences against TorchJD's `pref_vector`."""

import pytest
import torch

import dtokd_kernels as dk
from dtokd_kernels.weighting import DTO, AlignedMTL, ConFIG, DualProj, Reachable, Share, UPGrad

from .inputs import families

NO = torch.tensor(False)


def random(K, seed=0, n=40):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, generator=generator, dtype=torch.float64)
    return common / 2 + torch.randn(K, n, generator=generator, dtype=torch.float64)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("K", [1, 2, 3, 5, 8])
def test_with_minima_it_is_dto_on_the_gains(K):
    J = random(K, K)
    losses = torch.arange(2, K + 2, dtype=torch.float64)
    minima = [0.3 * i - 0.5 for i in range(K)]
    rule = Reachable(loss_min=minima)
    gains = losses - numbers(*minima)
    expected = DTO()(J @ J.T / (gains[:, None] * gains)) / gains
    torch.testing.assert_close(rule(J @ J.T, losses), expected, rtol=1e-12, atol=0)
    # minima of 0 are the paper's rule
    record, plain = (dk.balance(J @ J.T, losses, weighting=w) for w in (Reachable(loss_min=[0] * K), DTO()))
    torch.testing.assert_close(record.coefficients, plain.coefficients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("seed", range(10))
def test_gains_fall_in_proportion_to_the_preference(seed):
    J = torch.randn(3, 400, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    losses, preference = numbers(1.0, 1.4, 1.2), numbers(1.0, 1.5, 1.2)
    weights = Reachable(loss_min=[0.1, 0.2, 0.3], preference=preference.tolist())(J @ J.T, losses)
    assert (weights > 0).all()
    rates = J @ (weights @ J) / (losses - numbers(0.1, 0.2, 0.3))
    torch.testing.assert_close(rates / rates[0], preference / preference[0], rtol=1e-9, atol=0)


def test_no_loss_rises_to_first_order():
    for family, J in families(4).items():
        gram = J @ J.T
        weights = Reachable(loss_min=[0.0] * 4, preference=[1, 5, 2, 0.1])(gram, torch.ones(4, dtype=torch.float64))
        norms = gram.diagonal().sqrt()
        assert (gram @ weights >= -1e-7 * norms * (weights @ norms)).all(), family


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_estimate_is_in_proportion_to_what_is_left_of_a_power_law(power):
    """Two losses with the same law, one with a minimum of 5: in 500 steps their gains are found to be alike."""
    rule = Reachable()
    gram = torch.eye(2, dtype=torch.float64)
    for t in range(1, 501):
        left = 3 * t**-power
        weights = rule(gram, numbers(left, 5 + left))
        rule.commit(NO)
        if t <= 10:  # not known yet: as DTO
            assert weights[1] > 2 * weights[0]
    assert float(weights[1] / weights[0]) == pytest.approx(1, rel=0.05)
    plain = dk.balance(gram, numbers(left, 5 + left)).coefficients
    assert float(plain[1] / plain[0]) > 20


def test_a_loss_that_does_not_fall_has_little_to_gain():
    rule = Reachable()
    gram = torch.eye(2, dtype=torch.float64)
    for t in range(1, 101):
        weights = rule(gram, numbers(1 / t, 1 + t / 1000))
        rule.commit(NO)
    # the shortest combination of orthogonal gradients of lengths 1 / a_i has weights in proportion to a_i^2, over a_i
    assert weights.isfinite().all()
    means = rule.state_dict()
    first = float(means["means"][0] - means["recent"][0])
    assert float(weights[1] / weights[0]) == pytest.approx(1e-3 * 1.1 / first, rel=1e-6)


def test_an_objective_at_its_minimum_is_left_out():
    rule = Reachable(loss_min={"task": 0.0, "distill": 0.5})
    rule.expect(("task", "distill"))
    gram = torch.eye(2, dtype=torch.float64)
    assert rule(gram, numbers(2.0, 0.5)).tolist() == [0.5, 0.0]
    assert rule(gram, numbers(2.0, 0.4)).tolist() == [0.5, 0.0]


def test_skipped_steps_and_absent_objectives_are_not_averaged():
    a, b = Reachable(), Reachable()
    gram = torch.eye(2, dtype=torch.float64)
    for t in range(1, 31):
        losses = numbers(1 / t, 2 / t)
        a(gram, losses)
        a.commit(NO)
        b(gram, losses)
        b.commit(NO)
        b(gram, numbers(100.0, float("nan")))
        b.commit(~NO)
    assert torch.equal(a(gram, losses), b(gram, losses))
    b(torch.diag(numbers(1.0, 0.0)), losses)
    b.commit(NO)
    assert b.state_dict()["steps"].tolist() == [31, 30]


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_units_do_not_matter(factor):
    J = random(2)
    units = numbers(1.0, factor)
    plain, scaled = Reachable(), Reachable()
    for t in range(1, 40):
        losses = numbers(1 / t, 2 + t**-0.5)
        a = plain(J @ J.T, losses)
        b = scaled(J @ J.T * units[:, None] * units, losses * units)
        plain.commit(NO)
        scaled.commit(NO)
        torch.testing.assert_close(b * units, a, rtol=1e-9, atol=0)


def test_refusals():
    for wrong in ([float("nan"), 1], [1, "x"], [True, 1]):
        with pytest.raises(ValueError, match=r"loss_min\["):
            Reachable(loss_min=wrong)
    for wrong in ([0, 1], [-1, 1], [float("inf"), 1]):
        with pytest.raises(ValueError, match=r"preference\["):
            Reachable(preference=wrong)
    with pytest.raises(TypeError, match="pass a list"):
        Reachable(loss_min=0.5)
    with pytest.raises(ValueError, match="preference are of"):
        Reachable(preference={"task": 1, "kd": 2}).expect(("task", "distill"))
    with pytest.raises(ValueError, match="2 numbers, but there are 3"):
        Reachable(loss_min=[0, 0])(torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="the losses have none"):
        Share({"a": 0.5, "b": 0.5})(torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))


# ---- preferences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("name", ["UPGrad", "DualProj", "AlignedMTL", "ConFIG"])
def test_preferences_are_those_of_torchjd(name, K):
    jd = pytest.importorskip("torchjd.aggregation")
    J = random(K, seed=3)
    preference = torch.arange(1, K + 1, dtype=torch.float64) / K
    ours = {"UPGrad": UPGrad, "DualProj": DualProj, "AlignedMTL": AlignedMTL, "ConFIG": ConFIG}[name]
    theirs = getattr(jd, name)(pref_vector=preference)(J)
    weights = ours(preference=preference.tolist())(J @ J.T)
    torch.testing.assert_close(weights @ J, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    plain = ours()(J @ J.T)
    assert not torch.allclose(weights / weights.sum(), plain / plain.sum(), rtol=1e-3)


@pytest.mark.parametrize("rule", [UPGrad, DualProj, AlignedMTL, ConFIG])
@pytest.mark.parametrize("K", [2, 3, 6])
def test_equal_preferences_are_none_and_the_order_does_not_matter(rule, K):
    J = random(K, seed=K)
    gram = J @ J.T
    equal = 1.0 if rule is ConFIG else 1 / K
    torch.testing.assert_close(rule(preference=[equal] * K)(gram), rule()(gram), rtol=1e-12, atol=1e-15)
    preference = [float(i + 1) for i in range(K)]
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    moved = rule(preference=[preference[i] for i in order])(gram[order][:, order])
    torch.testing.assert_close(moved, rule(preference=preference)(gram)[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", [UPGrad, DualProj, AlignedMTL, ConFIG])
def test_wrong_preferences(rule):
    for wrong in ([-1, 1], [float("nan"), 1], ["a", 1], [0, 0]):
        with pytest.raises(ValueError, match="preference"):
            rule(preference=wrong)
    for wrong in ("ab", 3, torch.ones(2)):
        with pytest.raises(TypeError, match="pass a list"):
            rule(preference=wrong)
    with pytest.raises(ValueError, match="2 numbers for 3"):
        rule(preference=[1, 2])(torch.eye(3, dtype=torch.float64))
