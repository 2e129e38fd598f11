"""The weightings' solvers in C++ against those in torch's operations, in float64, on the same Gram matrices."""

import itertools

import pytest
import torch

import dtokd_kernels as dk
from dtokd_kernels import native, solvers, weighting
from dtokd_kernels.weighting import cagrad, nashmtl, pcgrad
from dtokd_kernels.weighting._dual_cone import dual_cone_weights

from . import tolerances
from .inputs import FAMILIES, families

pytestmark = pytest.mark.skipif(native.missing is not None, reason=f"no extension: {native.missing}")

SIZES = (1, 2, 3, 4, 5, 6, 7, 8)
#: By name: the solver's function and its arguments after the Gram matrix.
CALLS = {
    "upgrad": (dual_cone_weights, (True,)),
    "dualproj": (dual_cone_weights, (False,)),
    "cagrad": (cagrad.cagrad_weights, (0.5,)),
    "cagrad, far": (cagrad.cagrad_weights, (0.99,)),
    "cagrad, the mean": (cagrad.cagrad_weights, (0.0,)),
    "nashmtl": (nashmtl.nash_weights, ()),
    "pcgrad": (pcgrad.pcgrad_weights, (torch.tensor(7), 2**70 + 3)),
}
each_call = pytest.mark.parametrize("name", CALLS)
#: Gradients whose weights are unique and well conditioned enough to be compared.
GENERIC = ("random", "wide", "aligned", "conflicting", "tiny", "huge")


def gram_of(J):
    return J @ J.T


def both(name, gram):
    """Weights in torch's operations, and in C++."""
    function, args = CALLS[name]
    reference = function(gram, *args)
    with solvers.solved_by(native):
        return reference, function(gram, *args)


def solve(name):
    function, args = CALLS[name]
    return lambda gram: function(gram, *args)


def weight_bound(name, gram):
    bound = tolerances.sensitivity(solve(name), gram)
    if name == "cagrad, the mean":  # the distance errs by the root of rounding, in units of each gradient
        bound = bound + 1e-7 * gram.diagonal().max().sqrt() / gram.diagonal().sqrt()
    return bound


@each_call
@pytest.mark.parametrize("K", SIZES)
def test_weights_agree(name, K):
    for seed, family in enumerate(GENERIC):
        gram = gram_of(families(K, seed)[family])
        reference, ours = both(name, gram)
        assert ((ours - reference).abs() <= weight_bound(name, gram)).all(), (family, ours, reference)


@each_call
@pytest.mark.parametrize("K", SIZES)
def test_directions_agree_where_gradients_are_degenerate(name, K):
    """Weights are not unique there, the direction is: ||d - d'||^2 = (w - w')^T G (w - w').

    Rounding of the Gram matrix, EQUAL of the squared lengths, moves a projection by its root, in units of what the
    weights add up: where gradients cancel these are as long as 1e5 with `NashMTL`.
    """
    for seed, family in itertools.product(range(4), sorted(set(FAMILIES) - set(GENERIC))):
        J = families(K, seed)[family]
        gram = gram_of(J)
        reference, ours = both(name, gram)
        assert (ours[gram.diagonal() == 0] == reference[gram.diagonal() == 0]).all()
        lengths = J.norm(dim=1)
        size = (reference.abs() * lengths).sum()
        distance = ((ours - reference) @ J).norm()
        assert distance <= 4 * K * tolerances.EQUAL**0.5 * size, (family, seed, ours, reference)


@each_call
@pytest.mark.parametrize("K", SIZES)
def test_scales_far_apart(name, K):
    """Gradients 1e-60 to 1e60 long: a program of unit gradients all the same."""
    factors = torch.logspace(-60, 60, K, dtype=torch.float64)
    J = families(K)["random"] * factors[:, None]
    gram = gram_of(J)
    reference, ours = both(name, gram)
    assert ours.isfinite().all()
    assert ((ours - reference).abs() <= weight_bound(name, gram)).all(), (ours, reference)


@each_call
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1.0])
@pytest.mark.parametrize("K", [1, 3, 8])
def test_nothing_bad_comes_of_a_gram_that_is_none(name, bad, K):
    """They return, and say the same about which step is skipped."""
    for row in (False, True):
        gram = gram_of(families(K)["random"])
        gram[0, 0] = bad
        if row:
            gram[0] = gram[:, 0] = bad
        _, ours = both(name, gram)
        assert ours.shape == (K,)
    if bad != -1.0:
        rule = weighting.from_name(name.split(",")[0])
        for backend in ("cpu", "reference"):
            with dk.use_backend(backend):
                assert dk.balance(gram, torch.ones(K), rule).skipped


@each_call
def test_same_bits_each_time_and_for_any_memory(name):
    gram = gram_of(families(8)["conflicting"])
    strided = torch.zeros(8, 16, dtype=torch.float64)[:, ::2].copy_(gram)
    _, first = both(name, gram)
    for again in (gram, gram.clone(), strided):
        assert torch.equal(both(name, again)[1], first)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40, -(2**63), 2**64 - 1, 2**70])
@pytest.mark.parametrize("K", [2, 3, 8])
def test_pcgrad_draws_the_same_orders(seed, K):
    """Gradients that all conflict, so that each order has weights of its own."""
    J = torch.eye(K, dtype=torch.float64) - 1.5 / K + 0.1 * families(K)["random"][:, :K]
    gram = gram_of(J)
    orders = set()
    for step in (*range(20), 2**40, 2**62):
        args = (gram, torch.tensor(step), seed)
        reference = pcgrad.pcgrad_weights(*args)
        with solvers.solved_by(native):
            ours = pcgrad.pcgrad_weights(*args)
        assert torch.allclose(ours, reference, rtol=1e-12, atol=0)
        orders.add(tuple(ours.tolist()))
    assert K == 2 or len(orders) > 1


@pytest.mark.parametrize("name", sorted({name.split(",")[0] for name in CALLS}))
def test_backend_decides_who_solves(monkeypatch, name):
    """C++ for the CPU's backend, torch's operations for the reference; also behind a source that wraps the rule."""
    called = []
    for function in {function.__name__ for function, _ in CALLS.values()}:
        own = getattr(native, function)
        monkeypatch.setattr(native, function, lambda *args, own=own: called.append(own.__name__) or own(*args))
    gram = gram_of(families(3)["conflicting"])
    with dk.use_backend("reference"):
        dk.balance(gram, torch.ones(3), weighting.from_name(name))
    assert not called
    with dk.use_backend("cpu"):
        dk.balance(gram, torch.ones(3), weighting.from_name(name))
    assert len(called) == 1
    p = torch.nn.Parameter(torch.ones(3))
    for backend, calls in (("reference", 1), ("cpu", 2)):
        optimizer = dk.DTOSGD(
            [p], lr=0.1, weighting=weighting.from_name(name), gram=dk.sources.Ema(0.5), backend=backend
        )
        optimizer.backward([(p * torch.tensor([1.0, -1.0, 2.0])).sum() + 9, p.square().sum()])
        optimizer.step()
        assert len(called) == calls
