"""DTOLion: timm's Lion on a balanced direction, by every backend; the worked example of a new update rule."""

import copy

import pytest
import torch
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels import backends
from dtokd_kernels.types import Role

from .device import DEVICE
from .inputs import each_dtype, gradients
from .updates import Update, measure_and_run, run

Lion = pytest.importorskip("timm.optim.lion").Lion
NUMBERS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "maximize": False}
SHAPES = [8192 + 77, 5, (0,), (3, 4)]


def student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(DEVICE, torch.float64)


def losses_of(model, seed):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), device="cpu").to(DEVICE, torch.float64)
    out = model(x)
    return out.square().mean(), (out - 1).square().mean()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_a_plain_sum_trains_as_timms(backend, weight_decay, maximize):
    """Five steps of the losses' sum, the state too; timm's state loads, and a step goes on from it.

    In float64: a sign that rounding decides would be another one.
    """
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": weight_decay, "maximize": maximize}
    ours, theirs = student(), student()
    fixed = dk.weighting.Fixed([1.0, 1.0])
    optimizer = dk.DTOLion(ours.parameters(), weighting=fixed, gram="exact", backend=backend, **options)
    timms = Lion(theirs.parameters(), foreach=False, **options)
    for step in range(5):
        optimizer.zero_grad()
        timms.zero_grad()
        optimizer.backward(losses_of(ours, step))
        sum(losses_of(theirs, step)).backward()
        optimizer.step()
        timms.step()
        if step == 2:
            state = copy.deepcopy(timms.state_dict())  # torch shares what it loads
            optimizer.load_state_dict(state | {"param_groups": optimizer.state_dict()["param_groups"]})
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
            held, expected = optimizer.state[p]["exp_avg"], timms.state[q]["exp_avg"]
            torch.testing.assert_close(held, expected, rtol=1e-12, atol=1e-12)


def update(dtype, K=2, **options):
    rows = gradients(K + 2, SHAPES, dtype)
    state = {"exp_avg": rows[K + 1]}
    return Update("lion", Role.SHARED, tuple(range(K)), rows[K], rows[:K], state, NUMBERS | options)


@each_dtype
@pytest.mark.parametrize("K", [1, 2, 3, 8])
def test_kernels_agree_with_the_reference(backend, dtype, K):
    """In float64 from the same numbers; where the sign is that of rounding, either is right."""
    table = torch.linspace(-1, 1.5, K, dtype=torch.float64).expand(3, -1)
    one, truth = update(dtype, K), update(dtype, K)
    truth.params = [p.double() for p in truth.params]
    truth.state = {"exp_avg": [m.double() for m in truth.state["exp_avg"]]}
    truth.grads = [[g.double() for g in row] for row in truth.grads]
    grads = [sum(c * g for c, g in zip(table[0], row, strict=True)) for row in zip(*truth.grads, strict=True)]
    mixed = [m.lerp(g, 0.1) for m, g in zip(truth.state["exp_avg"], grads, strict=True)]
    run(backends.REFERENCE, [truth], table, torch.tensor(False))
    run(backends.select(DEVICE), [one], table, torch.tensor(False))
    unit = torch.finfo(dtype).eps
    for p, q, m, n, c in zip(
        one.params, truth.params, one.state["exp_avg"], truth.state["exp_avg"], mixed, strict=True
    ):
        sure = c.abs() > 1e-5
        assert ((p.double() - q).abs() <= 2 * unit * (1 + q.abs()))[sure].all()
        assert ((m.double() - n).abs() <= 8 * unit * (1 + n.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sign_of_nothing_is_zero(backend, dtype):
    """Parameters without a gradient and momentum stay; those of the smallest ones move by the whole learning rate."""
    p = torch.ones(3, dtype=dtype)
    g = torch.tensor([0.0, 1e-36, -1e-36], dtype=dtype)
    one = Update(
        "lion", Role.SHARED, (0,), [p], [[g]], {"exp_avg": [torch.zeros_like(p)]}, NUMBERS | {"weight_decay": 0.0}
    )
    run(backends.select(DEVICE), [one], torch.ones(3, 1, dtype=torch.float64), torch.tensor(False))
    torch.testing.assert_close(p, torch.tensor([1.0, 0.99, 1.01], dtype=dtype))


def test_an_update_that_measures_has_the_same_bits(backend):
    table = torch.linspace(0, 1, 6, dtype=torch.float64).view(3, 2)
    for skipped in (torch.tensor(False), torch.tensor(True)):
        two, one = update(torch.float32), update(torch.float32)
        run(backends.select(DEVICE), [two], table, skipped)
        grams = measure_and_run(backends.select(DEVICE), [one], table, skipped)
        assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))
        assert torch.equal(grams[Role.SHARED], dk.gram(one.grads))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": "1e-4"}, "lr"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ({"betas": 0.9}, "betas"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"weight_decay": None}, "weight_decay"),
    ],
)
def test_numbers_out_of_range_are_refused(options, name):
    with pytest.raises(ValueError, match=f"DTOLion: {name}.* is .*; pass (a|two) number"):
        dk.DTOLion(student().parameters(), **options)
