"""State of another dtype than the parameters, and float32 master copies of half-precision parameters."""

import io

import pytest
import torch
from torch import nn

import dtokd_kernels as dk

from .oracle import nothing_with_gradient

STEPS = 12
HALF = (torch.bfloat16, torch.float16)
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, dk.DTOAdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, dk.DTOSGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1}),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
each_half = pytest.mark.parametrize("dtype", HALF, ids=str)


def case(dtype):
    """A parameter, and the constant gradients of two objectives."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(70, 3, generator=generator).to(dtype) for _ in range(3)]
    return nn.Parameter(values[0]), values[1:]


def ours(p, name, **options):
    _, make, arguments = OPTIMIZERS[name]
    raw = dk.weighting.Fixed([1.0, 1.0])
    return make([p], **arguments, weighting=raw, rescale="none", gram="exact", **options)


def step(optimizer, p, gradients):
    optimizer.zero_grad()
    optimizer.backward([(p * g).sum() for g in gradients])
    optimizer.step()


def close(actual, expected, roundings=64):
    """Within some roundings of float32: as many as steps and operations of a step."""
    scale = expected.abs().max().item()
    assert (actual.double() - expected.double()).abs().max().item() <= roundings * 2.0**-24 * scale


@each_optimizer
@each_half
def test_master_weights_follow_a_float32_run(backend, name, dtype):
    p, gradients = case(dtype)
    exact = nn.Parameter(p.detach().float())
    theirs, _, arguments = OPTIMIZERS[name]
    reference = theirs([exact], **arguments)
    optimizer = ours(p, name, state_dtype=torch.float32, master_weights=True)
    for _ in range(STEPS):
        step(optimizer, p, gradients)
        exact.grad = sum(g.float() for g in gradients)
        reference.step()
    state = optimizer.state[p]
    assert {v.dtype for k, v in state.items() if k != "step"} == {torch.float32}
    close(state["master"], exact.detach())
    assert torch.equal(p.detach(), state["master"].to(dtype))
    for key, value in reference.state[exact].items():
        if key != "step":
            close(state[key], value)


@each_optimizer
@each_half
def test_without_master_weights_small_updates_are_lost(backend, name, dtype):
    """What the copy is for: an update below half a rounding of the parameter leaves it as it is."""
    ends = []
    for master_weights in (False, True):
        p = nn.Parameter(torch.ones(8, dtype=dtype))
        optimizer = ours(p, name, state_dtype=torch.float32, master_weights=master_weights)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 2.0**-13, 0.0
        for _ in range(200):
            step(optimizer, p, [torch.ones_like(p) / 20, torch.ones_like(p) / 20])
        ends.append(p.detach())
    assert (ends[0] == 1).all()
    assert (ends[1] < 1).all()


@each_optimizer
def test_bfloat16_state_of_float32_parameters(backend, name):
    p, gradients = case(torch.float32)
    other = nn.Parameter(p.detach().clone())
    optimizer, full = ours(p, name, state_dtype=torch.bfloat16), ours(other, name)
    for _ in range(STEPS):
        step(optimizer, p, gradients)
        step(full, other, gradients)
    moments = [k for k in optimizer.state[p] if k != "step"]
    for key in moments:
        rounded, value = optimizer.state[p][key], full.state[other][key]
        assert rounded.dtype == torch.bfloat16
        # each step rounds once, 2^-8 of a value that never exceeds the largest
        assert (rounded.float() - value).abs().max() <= STEPS * 2.0**-8 * value.abs().max()
    assert not torch.equal(p, other)


@each_optimizer
def test_state_dict_keeps_the_precision(backend, name):
    p, gradients = case(torch.bfloat16)
    options = {"state_dtype": torch.float32, "master_weights": True}
    optimizer = ours(p, name, **options)
    for _ in range(3):
        step(optimizer, p, gradients)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copy = nn.Parameter(p.detach().clone())
    loaded = ours(copy, name, **options)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for key, value in optimizer.state[p].items():
        assert torch.equal(loaded.state[copy][key], value)
        assert loaded.state[copy][key].dtype == value.dtype
    for q, o in ((p, optimizer), (copy, loaded)):
        step(o, q, gradients)
    assert torch.equal(p, copy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8, "bfloat16"], ids=str)
def test_unknown_dtype_of_state(dtype):
    with pytest.raises(ValueError, match=r"DTOAdamW: state_dtype is .*choose torch\.float32 or torch\.bfloat16"):
        dk.DTOAdamW([nn.Parameter(torch.ones(1))], state_dtype=dtype)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_master_copy_follows_who_writes_the_parameter(backend, name):
    """Weights that were loaded, or trained by another optimizer in between, are where the next step starts."""
    p, gradients = case(torch.bfloat16)
    optimizer = ours(p, name, master_weights=True)
    start = p.detach().clone()
    for _ in range(5):
        step(optimizer, p, [100 * g for g in gradients])
    master = optimizer.state[p]["master"]
    moved = p.detach().clone()
    assert not torch.equal(moved, start)
    with torch.no_grad():
        p[:35].copy_(start[:35])
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    before = master.clone()
    step(optimizer, p, gradients)
    assert torch.equal(p[:35], start[:35])
    assert torch.equal(p[35:], moved[35:])
    changed = start[:35] != moved[:35]
    assert torch.equal(master[:35][changed], start[:35][changed].float())
    assert torch.equal(master[35:], before[35:])  # what the rounding has lost is still there


@pytest.mark.parametrize("where", ["before", "after"])
def test_hooks_of_loading_have_the_last_word(where):
    p, gradients = case(torch.bfloat16)
    optimizer = ours(p, "adamw", state_dtype=torch.float32)
    step(optimizer, p, gradients)
    state = optimizer.state_dict()
    if where == "before":

        def halved(_, state):
            first = {**state["state"][0], "exp_avg": state["state"][0]["exp_avg"] / 2}
            return {**state, "state": {0: first}}

        optimizer.register_load_state_dict_pre_hook(halved)
    else:
        optimizer.register_load_state_dict_post_hook(
            lambda loaded: loaded.state[p].update(exp_avg=loaded.state[p]["exp_avg"] / 2)
        )
    expected = optimizer.state[p]["exp_avg"] / 2
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[p]["exp_avg"], expected)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize("between", ["unreached", "skipped", "cleared", "loaded"])
def test_a_master_copy_that_a_step_has_not_seen(backend, between):
    """What is written before such a step counts in the next; a copy that is gone is made anew."""
    p, gradients = case(torch.bfloat16)
    q = nn.Parameter(p.detach().clone())
    plain = dk.weighting.Fixed([1.0, 1.0])
    optimizer = dk.DTOSGD([p, q], lr=1e-3, master_weights=True, weighting=plain, rescale="none", gram="exact")

    def take(*chosen, more=0.0):
        optimizer.zero_grad()
        optimizer.backward([sum((x * g).sum() for x in chosen) + more for g in gradients])
        optimizer.step()

    take(p, q)
    if between in ("unreached", "skipped"):
        with torch.no_grad():
            q.fill_(5.0)
        if between == "unreached":
            take(p)
        else:
            take(p, q, more=nothing_with_gradient(q, torch.inf))
            assert optimizer.balance.skipped
        take(p, q)
        assert (q - 5).abs().max() < 0.1
        return
    if between == "cleared":
        optimizer.state.clear()
    else:
        optimizer.load_state_dict(dk.DTOSGD([p, q], lr=1e-3).state_dict())
    take(p, q)
    for x in (p, q):
        assert torch.equal(optimizer.state[x]["master"].to(x.dtype), x)
