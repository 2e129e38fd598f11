"""Gram matrices measured while the backward pass runs."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dtokd_kernels as dk
from dtokd_kernels import backends

from . import tolerances
from .oracle import Student, batch, losses_of
from .sources import train


def test_overlap_leaves_nothing_to_step(backend, monkeypatch):
    """The products are taken in the last pass; step takes none."""
    module = backends.select(torch.device("cpu"))
    calls, original = [], module.gram
    monkeypatch.setattr(module, "gram", lambda rows, K: calls.append(rows.layout.reach[0]) or original(rows, K))
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), gram="overlap")
    optimizer.backward(losses_of(model, batch()))
    assert set(calls) == {1, 2, 3}  # reached by one, by the other, by both
    calls.clear()
    optimizer.step()
    assert not calls


def test_overlap_takes_products_during_the_pass(backend, monkeypatch):
    """Buckets are taken as soon as they are full, while autograd is still at work."""
    monkeypatch.setitem(dk.sources.buckets.BUCKET, "cpu", 8)
    module = backends.select(torch.device("cpu"))
    events, original = [], module.gram
    monkeypatch.setattr(module, "gram", lambda rows, K: events.append("gram") or original(rows, K))
    first, second = (nn.Parameter(torch.randn(3, 3, dtype=torch.float64)) for _ in range(2))
    first.register_hook(lambda grad: events.append("first"))
    x = torch.randn(2, 3, dtype=torch.float64)
    optimizer = dk.DTOSGD([first, second], lr=0.1, gram="overlap")
    out = torch.tanh(x @ first) @ second
    optimizer.backward([out.square().mean(), (out - 1).square().mean()])
    assert events == ["first", "gram", "first", "gram"]


@pytest.mark.parametrize("source", ["overlap", "lag"])
def test_hooks_are_removed(backend, source):
    """Also after a pass that failed."""
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), gram=source)

    def hooks():
        return [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]

    optimizer.backward(losses_of(model, batch()))
    assert not any(hooks())

    def fail(grad):
        raise RuntimeError("in the middle of a pass")

    handle = model.trunk.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle of a pass"):
        optimizer.backward(losses_of(model, batch()))
    handle.remove()
    assert not any(hooks())
    assert optimizer.objectives == ()
    optimizer.backward(losses_of(model, batch()))
    optimizer.step()
    assert not optimizer.balance.skipped


def test_overlap_of_checkpointed_segments(backend):
    """A parameter in two checkpointed segments gets its gradient in two parts, and its hook fires twice."""
    ends = []
    for source in ("exact", "overlap"):
        torch.manual_seed(1)
        layer = nn.Linear(3, 3, dtype=torch.float64)
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        out = checkpoint(layer, torch.tanh(checkpoint(layer, x, use_reentrant=True)), use_reentrant=True)
        optimizer = dk.DTOSGD(layer.parameters(), lr=0.1, gram=source)
        optimizer.backward([out.square().mean()])
        optimizer.step()
        ends.append(optimizer.balance.gram)
    assert (ends[0] - ends[1]).abs().max() <= tolerances.REORDERED


@pytest.mark.parametrize("source", ["overlap", "lag"])
def test_frozen_and_added_parameters(backend, source):
    ends = []
    for gram in ("exact", source):
        model = Student()
        model.trunk.weight.requires_grad_(False)
        optimizer = dk.DTOAdamW(model.trunk.parameters(), lr=1e-2, gram=gram)
        train(model, optimizer, 1)
        model.trunk.weight.requires_grad_(True)
        optimizer.add_param_group({"params": [model.scale, *model.head.parameters()]})
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch(1)))
        optimizer.step()
        ends.append(optimizer.balance.gram)
    assert (ends[0] - ends[1]).abs().max() <= tolerances.REORDERED * ends[0].max()


@pytest.mark.parametrize("gram", ["exact", "overlap", "lag"])
def test_removed_parameters_are_in_no_product(backend, gram):
    """A group that goes between backward and step: its gradients count no more, whoever took their products."""
    grams = []
    for both in (True, False):
        a, b = (nn.Parameter(torch.full((n,), float(n))) for n in (3, 2))
        optimizer = dk.DTOSGD([{"params": [a]}, {"params": [b]}] if both else [b], lr=0.1, gram=gram)
        optimizer.backward([a.sum() + b.square().sum(), a.square().sum() + (b - 1).square().sum()])
        if both:
            del optimizer.param_groups[0]
        optimizer.step()
        grams.append(optimizer.balance.gram)
    assert torch.equal(*grams)
