"""dk.backward: balanced gradients in `.grad`, for any optimizer."""

import gc
import weakref

import pytest
import torch
from torch import nn

import dtokd_kernels as dk

from . import tolerances
from .device import DEVICE
from .oracle import Student, assert_directions, balanced, batch, losses_of, nothing_with_gradient, of_many_reaches


@pytest.mark.parametrize("private", ["own", "balanced"])
@pytest.mark.parametrize("rescale", ["none", "sum"])
@pytest.mark.parametrize("max_norm", [None, 0.05, 100.0])
def test_fills_grad(backend, max_norm, rescale, private):
    model = Student()
    params = list(model.parameters())
    options = {"max_norm": max_norm, "rescale": rescale, "private": private}
    expected = balanced(list(losses_of(model, batch()).values()), params, **options)
    record = dk.backward(losses_of(model, batch()), params, **options)
    assert_directions([p.grad for p in params], expected)
    assert model.unused.grad is None
    assert (record.weights - expected.weights).abs().max() <= tolerances.REORDERED
    assert (record.norm - expected.norm).abs() <= tolerances.REORDERED * expected.norm


@pytest.mark.parametrize("loss_floor", [1e-8, 50.0])
@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("log_gradients", [True, False])
def test_weighting_and_floor(backend, log_gradients, clamp, loss_floor):
    model = Student()
    params = list(model.parameters())
    options = {"log_gradients": log_gradients, "clamp": clamp}
    expected = balanced(list(losses_of(model, batch()).values()), params, loss_floor=loss_floor, **options)
    dk.backward(losses_of(model, batch()), params, dk.weighting.DTO(**options), loss_floor=loss_floor)
    assert_directions([p.grad for p in params], expected)


def test_adds_to_grad(backend):
    model = Student()
    params = list(model.parameters())
    dk.backward(losses_of(model, batch()), params)
    once = [None if p.grad is None else p.grad.clone() for p in params]
    held = [p.grad for p in params]
    dk.backward(losses_of(model, batch()), params)
    for p, first, same in zip(params, once, held, strict=True):
        if first is not None:
            assert p.grad is same  # in place, as torch does it: whoever holds the tensor sees the sum
            assert torch.equal(p.grad, 2 * first)


@pytest.mark.parametrize("rescale", ["none", "sum"])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_share_of_a_batch(backend, max_norm, rescale):
    """Equal micro-batches with their share give what one of them gives alone; a clipped sum is no longer."""
    models = [Student(), Student()]
    for model, parts in zip(models, (1, 4), strict=True):
        for _ in range(parts):
            dk.backward(
                losses_of(model, batch()), model.parameters(), max_norm=max_norm, rescale=rescale, share=1 / parts
            )
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_share_out_of_range(share):
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"^backward: share is .*; pass this call's part of the batch"):
        dk.backward([w.sum()], [w], share=share)
    assert w.grad is None


@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "generator of parameters", "stacked"])
def test_kinds_of_arguments(backend, kind):
    model = Student()
    losses = losses_of(model, batch())
    # balanced: through a stack every objective reaches what any of them reaches, with zeros
    expected = balanced(list(losses.values()), list(model.parameters()), private="balanced")
    params = model.parameters()
    if kind == "list":
        losses = list(losses.values())
    elif kind == "tuple":
        losses = tuple(losses.values())
    elif kind == "stacked":
        losses = torch.stack(list(losses.values()))
    dk.backward(losses, params if kind.startswith("generator") else list(params), private="balanced")
    assert_directions([p.grad for p in model.parameters()], expected)


def test_one_objective(backend):
    """With one loss, balanced over its logarithm: g / L."""
    model = Student()
    loss = losses_of(model, batch())["task"]
    dk.backward(loss, model.parameters())
    got = [p.grad for p in model.parameters()]
    expected = balanced([losses_of(model, batch())["task"]], list(model.parameters()))
    assert_directions(got, expected)
    assert model.projector.weight.grad is None


@pytest.mark.parametrize("K", [3, 8])
def test_many_objectives_of_many_reaches(backend, K):
    """Parameters reached by one, several and all objectives."""
    params, losses = of_many_reaches(K)
    expected = balanced(losses(), params)
    dk.backward(losses(), params)
    assert_directions([p.grad for p in params], expected)


def test_everything_private(backend):
    """Objectives that share no parameter: nothing to balance, each takes its own gradients, over its loss."""
    a, b = (nn.Parameter(torch.tensor([2.0, 3.0])) for _ in range(2))
    record = dk.backward([a.square().sum(), b.square().sum()], [a, b])
    assert not record.skipped
    torch.testing.assert_close(a.grad, 2 * a.detach() / 13, rtol=4 * 2**-24, atol=0)
    torch.testing.assert_close(b.grad, 2 * b.detach() / 13, rtol=4 * 2**-24, atol=0)


def test_any_optimizer(backend):
    """torch.optim.SGD on these gradients is DTOSGD without its rescaling."""
    models = [Student(), Student()]
    optimizer = torch.optim.SGD(models[0].parameters(), lr=0.1, momentum=0.9)
    ours = dk.DTOSGD(models[1].parameters(), lr=0.1, momentum=0.9, rescale="none", max_norm=0.5)
    for step in range(10):
        optimizer.zero_grad()
        dk.backward(losses_of(models[0], batch(step)), models[0].parameters(), max_norm=0.5)
        optimizer.step()
        ours.zero_grad()
        ours.backward(losses_of(models[1], batch(step)))
        ours.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # 10 steps of a few roundings each, of numbers near 1
        torch.testing.assert_close(p, q, rtol=0, atol=10 * 64 * 2**-53)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("where", ["shared", "private"])
def test_skip_leaves_grad(backend, where, held, bad):
    model = Student()
    params = list(model.parameters())
    if held:
        for p in params:
            p.grad = torch.full_like(p, 3.0)
    before = [p.grad for p in params]
    losses = losses_of(model, batch())
    spoiled = model.scale if where == "shared" else model.head.bias
    losses["task"] = losses["task"] + nothing_with_gradient(spoiled, bad)
    record = dk.backward(losses, params)
    assert record.skipped
    for p, grad in zip(params, before, strict=True):
        if grad is None and DEVICE.type != "cpu":
            assert p.grad is None or not p.grad.any()
        else:
            assert p.grad is grad
            assert grad is None or (grad == 3.0).all()


def test_all_gradients_zero_is_a_skip(backend):
    w = nn.Parameter(torch.ones(3))
    record = dk.backward([(w * 0).sum() + 1, (w * 0).sum() + 2], [w])
    assert record.skipped
    assert w.grad is None or (DEVICE.type != "cpu" and not w.grad.any())


def test_frees_the_graph(backend):
    model = Student()
    losses = losses_of(model, batch())
    dk.backward(losses, model.parameters())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        losses["task"].backward()


def test_retain_graph(backend):
    model = Student()
    losses = losses_of(model, batch())
    dk.backward(losses, model.parameters(), retain_graph=True)
    first = model.trunk.weight.grad.clone()
    dk.backward(losses, model.parameters())
    assert torch.equal(model.trunk.weight.grad, 2 * first)


def test_keeps_nothing_alive(backend):
    """Neither the record nor `.grad` holds the graph, the losses or a gradient set."""
    model = Student()
    losses = losses_of(model, batch())
    intermediate = model.trunk(batch()[0])
    losses["task"] = losses["task"] + intermediate.square().mean()
    watched = [weakref.ref(intermediate), weakref.ref(losses["task"])]
    record = dk.backward(losses, model.parameters())
    del losses, intermediate
    gc.collect()
    assert record is not None
    assert all(ref() is None for ref in watched)


def test_other_parameters_get_plain_gradients(backend):
    """Leaves that are not in `params` get what plain backward calls give them: the sum."""
    model, plain = Student(), Student()
    inside = [model.trunk.weight, model.scale]
    model.head.bias.grad = torch.ones_like(model.head.bias)
    plain.head.bias.grad = torch.ones_like(plain.head.bias)
    dk.backward(losses_of(model, batch()), inside)
    losses = losses_of(plain, batch())
    losses["task"].backward(retain_graph=True)
    losses["distill"].backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if not any(p is r for r in inside):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_frozen_parameters(backend):
    model = Student()
    model.trunk.weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = balanced(list(losses_of(model, batch()).values()), trained)
    dk.backward(losses_of(model, batch()), model.parameters())
    assert model.trunk.weight.grad is None
    assert_directions([p.grad for p in trained], expected)


def test_parameters_stay(backend):
    model = Student()
    before = [p.detach().clone() for p in model.parameters()]
    dk.backward(losses_of(model, batch()), model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_several_dtypes(backend):
    """Every parameter takes part in one Gram matrix, and gets a gradient of its own type."""
    a = nn.Parameter(torch.randn(5, dtype=torch.float64))
    b = nn.Parameter(torch.randn(7).bfloat16())

    def losses():
        return [
            (a - 1).square().sum() + (b.double() - 2).square().sum(),
            (a + 1).square().sum() + (b.double() - 3).square().sum(),
        ]

    expected = balanced(losses(), [a, b])
    dk.backward(losses(), [a, b])
    assert (a.grad.dtype, b.grad.dtype) == (torch.float64, torch.bfloat16)
    assert_directions(
        [a.grad], type(expected)(expected.directions[:1], expected.weights, expected.norm, expected.tolerance)
    )
    assert (b.grad.double() - expected.directions[1]).abs().max() <= 2**-8 * expected.directions[1].abs().max()


def test_hooks_of_parameters_fire(backend):
    """AccumulateGrad runs, and with it the hooks that data-parallel wrappers rely on: once per objective."""
    w = nn.Parameter(torch.zeros(2))
    calls = []
    handle = w.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone()))
    dk.backward([(w - 1).square().sum(), (w - 2).square().sum()], [w])
    handle.remove()
    assert [c.tolist() for c in calls] == [[-2.0, -2.0], [-4.0, -4.0]]


def test_tied_parameters(backend):
    """A parameter used twice in the model has one gradient, the sum over its uses."""
    layer = nn.Linear(3, 3, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)

    def losses():
        out = layer(layer(x))
        return [out.square().mean(), (out - 1).square().mean()]

    expected = balanced(losses(), list(layer.parameters()))
    dk.backward(losses(), layer.parameters())
    assert_directions([p.grad for p in layer.parameters()], expected)


def test_gradients_laid_out_as_parameters(backend):
    """channels_last convolutions, whose gradients autograd lays out like the weights."""
    conv = nn.Conv2d(3, 4, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)

    def losses():
        return [conv(x).square().mean(), (conv(x) - 1).square().mean()]

    expected = balanced(losses(), list(conv.parameters()))
    dk.backward(losses(), conv.parameters())
    assert_directions([p.grad for p in conv.parameters()], expected)
    assert conv.weight.grad.is_contiguous(memory_format=torch.channels_last)
