"""Gram matrices of a part: of some parameters (`Probe`), or of the gradients at shared features (`Feature`)."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dtokd_kernels as dk
from dtokd_kernels.sources import Ema, Every, Feature, Probe

from . import tolerances
from .oracle import Student, batch, losses_of
from .sources import (
    copies,
    each_weighting,
)


@each_weighting
def test_probe_of_all_shared_parameters_is_exact(backend, weighting):
    model = Student()
    shared = [*model.trunk.parameters(), model.scale]
    exact = dk.backward(losses_of(model, batch()), model.parameters(), weighting)
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, weighting=weighting, gram=Probe(shared), rescale="none")
    before = copies(model.parameters())
    losses = losses_of(model, batch())
    optimizer.backward(losses)
    optimizer.step()
    record = optimizer.balance
    for field in ("weights", "coefficients", "gram", "cosine"):
        assert (getattr(record, field) - getattr(exact, field)).abs().max() <= 1e3 * tolerances.REORDERED, field
    for p in model.parameters():
        p.grad = None
    moved = [(b - p.detach()) / 0.1 for b, p in zip(before, model.parameters(), strict=True)]
    with torch.no_grad():
        for p, b in zip(model.parameters(), before, strict=True):
            p.copy_(b)
    # the gradient of the sum with constant coefficients, private parameters included
    sum(c * v for c, v in zip(exact.coefficients, losses_of(model, batch()).values(), strict=True)).backward()
    for p, m in zip(model.parameters(), moved, strict=True):
        assert (m - (0 if p.grad is None else p.grad)).abs().max() <= 1e4 * tolerances.REORDERED
    norm = torch.stack([m.square().sum() for m in moved]).sum().sqrt()
    assert (record.norm - norm).abs() <= 1e4 * tolerances.REORDERED


def test_probe_is_its_parameters_gram(backend):
    model = Student()
    losses = losses_of(model, batch())
    rows = [torch.autograd.grad(v, [model.trunk.bias], retain_graph=True) for v in losses.values()]
    optimizer = dk.DTOAdamW(model.parameters(), gram=Probe(model.trunk.bias))
    optimizer.backward(losses)
    optimizer.step()
    assert torch.equal(optimizer.balance.gram, dk.gram(rows))


def test_probe_finds_the_last_shared_parameters(backend):
    """In an exact step; then one full pass a step."""
    blocks = nn.Sequential(*[nn.Linear(8, 8, dtype=torch.float64) for _ in range(20)])
    heads = nn.ModuleList([nn.Linear(8, 2, dtype=torch.float64) for _ in range(2)])
    optimizer = dk.DTOAdamW([*blocks.parameters(), *heads.parameters()], gram="probe")
    x = torch.randn(5, 8, dtype=torch.float64)
    for step in range(3):
        passes = []
        handle = blocks[0].weight.register_hook(lambda grad, passes=passes: passes.append(1))
        z = blocks(x)
        losses = [head(z).square().mean() for head in heads]
        probed = [p for block in blocks[-2:] for p in block.parameters()]  # a twentieth each; a sixteenth is two
        rows = [torch.autograd.grad(v, probed, retain_graph=True) for v in losses]
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
        handle.remove()
        assert len(passes) == (2 if step == 0 else 1)
        if step:
            gram = dk.gram([row[1:] if len(row) == 4 else row for row in rows])
            whole = dk.gram(rows)
            assert any(torch.allclose(optimizer.balance.gram, g, rtol=1e-12, atol=0) for g in (gram, whole))


@pytest.mark.parametrize("passed", [True, False], ids=["features", "module"])
def test_feature_by_hand(backend, passed):
    model = Student()
    x, y, z = batch()
    hidden = torch.tanh(model.trunk(x)) * model.scale
    losses = [(model.head(hidden) - y).square().mean(), (model.projector(hidden) - z).square().mean()]
    point = hidden if passed else model.trunk(x)
    rows = [torch.autograd.grad(v, hidden, retain_graph=True)[0].flatten() for v in losses]
    J = torch.stack(rows) / torch.stack(losses).detach()[:, None]
    expected = dk.min_norm_weights(J @ J.T)
    if passed:
        optimizer = dk.DTOAdamW(model.parameters(), gram=Feature())
        optimizer.backward(losses, features=point)
    else:
        watched = nn.Identity()
        optimizer = dk.DTOAdamW(model.parameters(), gram=Feature(watched))
        with torch.no_grad():
            watched(hidden * 0)
        hidden = watched(hidden)
        losses = [(model.head(hidden) - y).square().mean(), (model.projector(hidden) - z).square().mean()]
        with torch.no_grad():
            watched(hidden * 0)  # a validation pass in between is not the one that the losses come from
        optimizer.backward(losses)
    optimizer.step()
    assert (optimizer.balance.weights - expected).abs().max() <= tolerances.REORDERED


def test_feature_keeps_no_graph_and_no_hook(backend):
    layer = nn.Linear(3, 3)
    source = Feature(layer)
    w = nn.Linear(3, 1)
    out = w(layer(torch.ones(2, 3)))
    dk.backward([out.square().mean(), (out - 1).square().mean()], layer.parameters(), gram=source)
    assert source._output is None
    assert len(layer._forward_hooks) == 1
    del source
    gc.collect()
    assert not layer._forward_hooks


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: Every(3, s), lambda s: Ema(0.5, Every(3, s))])
def test_no_graph_is_kept_between_measurements(backend, wrap):
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), gram=wrap(Feature(model.trunk)))
    held = []
    model.trunk.register_forward_hook(lambda module, given, output: held.append(weakref.ref(output)))
    for step in range(4):
        optimizer.backward(losses_of(model, batch(step)))
        gc.collect()
        assert held[-1]() is None
        optimizer.step()
        optimizer.zero_grad()


def test_a_model_with_a_feature_can_be_copied_and_pickled():
    """A copy's outputs are its own affair: an EMA model runs between the forward and the backward pass."""
    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, gram=Feature(model.trunk))
    average = copy.deepcopy(model)
    pickle.loads(pickle.dumps((model, optimizer)))
    losses = losses_of(model, batch())
    losses_of(average, batch(1))
    optimizer.backward(losses)
    optimizer.step()
    assert not optimizer.balance.skipped


def test_probe_without_shared_parameters(backend):
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = dk.DTOAdamW([a, b], gram="probe")
    optimizer.backward([a.sum(), b.sum()])
    message = r"gram=Probe\(\) found no parameter that all objectives reach; pass those"
    with pytest.raises(ValueError, match=f"^DTOAdamW.step: {message}"):
        optimizer.step()
    assert a.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=f"^backward: {message}"):
        dk.backward([a.sum(), b.sum()], [a, b], gram="probe")


@pytest.mark.parametrize("change", ["frozen", "removed"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_probe_whose_parameters_are_gone_finds_others(backend, change, set_to_none):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer = dk.DTOAdamW([{"params": model[2].parameters()}, {"params": model[0].parameters()}], gram="probe")
    optimizer.param_groups.reverse()  # the last ones are probed

    def step():
        out = model(torch.ones(3, 4))
        optimizer.backward([out.square().mean(), (out - 1).square().mean()])
        optimizer.step()
        optimizer.zero_grad(set_to_none)
        return optimizer.balance.gram[0, 0], optimizer._sets.grads

    step()
    assert len(step()[1]) in (0, 1)  # one pass
    if change == "frozen":
        model[2].requires_grad_(False)
    else:
        del optimizer.param_groups[1]
    exact, probed = step()[0], step()[0]
    assert exact > 0
    assert probed > 0
    assert all(any(p is q for q in model[0].parameters()) for p in optimizer._source._found)


def test_probe_warns_of_what_it_does_not_see(backend):
    block, head = nn.Linear(4, 4), nn.Linear(4, 2)
    optimizer = dk.DTOAdamW([*block.parameters(), *head.parameters()], gram=Probe([block, head]))
    out = head(checkpoint(block, torch.ones(3, 4, requires_grad=True), use_reentrant=True))
    with pytest.warns(UserWarning, match=r"2 of the 4 parameters of gram=Probe.* have no gradient; .*reentrant"):
        optimizer.backward([out.square().mean(), (out - 1).square().mean()])
