"""TorchJD beside ours: its Gramian weightings plug in as they are, and its MGDA finds the same point."""

import pytest
import torch

import dtokd_kernels as dk

from . import tolerances
from .inputs import families, gram_of
from .test_balance import GRAM, LOSSES, close
from .test_weights import direction

jd = pytest.importorskip("torchjd.aggregation")


@pytest.mark.parametrize(
    "weighting",
    [jd.MeanWeighting(), jd.MGDAWeighting(epsilon=1e-12, max_iters=100), jd.UPGradWeighting(), jd.PCGradWeighting()],
    ids=lambda weighting: type(weighting).__name__,
)
def test_torchjd_weightings(backend, weighting):
    """TorchJD's Gramian weightings plug in as they are; they get the Gram of the log-gradients."""
    torch.manual_seed(1)
    balance = dk.balance(GRAM, LOSSES, weighting)
    scale = 1 / LOSSES
    torch.manual_seed(1)
    expected = weighting(scale[:, None] * GRAM * scale)
    close(balance.weights, expected.double())
    assert not balance.skipped


def test_torchjd_mgda_of_two_is_dto(backend):
    """For two objectives one exact line search of MGDA is the closed form."""
    ours = dk.balance(GRAM, LOSSES)
    theirs = dk.balance(GRAM, LOSSES, jd.MGDAWeighting(epsilon=1e-9, max_iters=100))
    close(ours.weights, theirs.weights, ulps=64)


@pytest.mark.parametrize("K", range(2, 9))
def test_agrees_with_torchjd_mgda(backend, K):
    """MGDA runs Frank-Wolfe: T iterations end at most 4 diameter^2 / (T + 2) above the smallest ||d||^2.

    The min-norm point x* of a convex set has ||x - x*||^2 <= ||x||^2 - ||x*||^2 for every x in it, which turns the
    excess that is left into a distance between the directions.
    """
    iterations = 200
    for family, J in families(K).items():
        J = J / J.norm(dim=1).max().clamp(min=1e-300)
        gram = gram_of(J)
        theirs = jd.MGDAWeighting(epsilon=1e-15, max_iters=iterations)(gram)
        ours = dk.min_norm_weights(gram)
        excess = (theirs @ gram @ theirs - ours @ gram @ ours).item()
        rounding = tolerances.kkt_gap_bound(gram)
        diameter2 = torch.cdist(J, J).max().item() ** 2
        assert -rounding <= excess <= 4 * diameter2 / (iterations + 2) + rounding, family
        distance2 = (direction(J, theirs) - direction(J, ours)).square().sum().item()
        assert distance2 <= max(excess, 0) + 2 * rounding, family
