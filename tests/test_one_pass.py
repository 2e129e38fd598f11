"""Weightings that need no Gram matrix take one backward pass of the weighted sum."""

import pytest
import torch
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels.sources import Probe

from . import tolerances
from .oracle import Student, batch, losses_of
from .sources import assert_same, copies, full_passes, train


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


def test_backward_of_a_weighting_without_gram(backend):
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    record = dk.backward([w.sum(), (2 * w).sum()], [w], dk.weighting.Fixed([0.5, 0.25]), max_norm=None)
    assert w.grad.tolist() == [1.0, 1.0]
    assert record.coefficients.tolist() == [0.5, 0.25]
