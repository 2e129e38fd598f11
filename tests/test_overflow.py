"""Finite gradients and losses whose update would not be finite: such a step changes nothing, and is counted."""

import copy
import itertools

import pytest
import torch
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels.types import limit_of

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
RULES = {
    "adamw": lambda params, **o: dk.DTOAdamW(params, lr=1e-3, **o),
    "amsgrad": lambda params, **o: dk.DTOAdamW(params, lr=1e-3, amsgrad=True, **o),
    "sgd": lambda params, **o: dk.DTOSGD(params, lr=0.1, rescale="none", **o),
    "momentum": lambda params, **o: dk.DTOSGD(params, lr=0.1, momentum=0.9, rescale="none", **o),
}
each_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES)
RAW = dk.weighting.Fixed([1.0, 1.0])


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, gradient, value):
        ctx.gradient = gradient
        return p.new_full((), value, dtype=torch.float64)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.gradient, None, None


def loss(p, gradient, value):
    """A loss of this value with this gradient."""
    return _Given.apply(p, torch.full_like(p, gradient), value)


def everything(optimizer):
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    return [*tensors, *(v for state in optimizer.state.values() for v in state.values() if v is not None)]


def step(optimizer, p, gradients, value=1.0):
    optimizer.zero_grad()
    optimizer.backward([loss(p, g, value) for g in gradients])
    optimizer.step()


#: Gradient and loss whose log-gradient, or its square, is beyond the dtype.
TOO_LARGE = {
    torch.float16: (5.0, 1e-6),
    torch.bfloat16: (3e37, 1.0),
    torch.float32: (3e37, 1.0),
    torch.float64: (1e300, 1.0),
}


@each_rule
@each_dtype
@pytest.mark.parametrize(
    ("source", "more"),
    [
        *((source, {}) for source in ("exact", "overlap", "lag", dk.sources.Every(2))),
        ("exact", {"master_weights": True}),
        ("lag", {"state_dtype": torch.float32}),
    ],
    ids=str,
)
def test_large_directions(backend, make, dtype, source, more):
    """Before, between and after steps that are taken."""
    p = nn.Parameter(torch.linspace(-1, 1, 37, dtype=dtype))
    optimizer = make([p], gram=source, **more)
    gradient, value = TOO_LARGE[dtype]
    for number in range(4):
        large = number != 1
        before = copy.deepcopy(everything(optimizer))
        step(optimizer, p, [gradient, gradient / 2] if large else [1e-3, 2e-3], value if large else 1.0)
        after = everything(optimizer)
        assert all(t.isfinite().all() for t in after)
        if optimizer.balance.skipped:
            # of the first step the state is new, and zero
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False))
        assert bool(optimizer.balance.skipped) or not torch.equal(after[0], before[0])
        if "state_dtype" not in more and "master_weights" not in more:
            assert bool(optimizer.balance.skipped) is large
    assert optimizer.skipped_steps >= (3 if not more else 0)


@each_dtype
def test_coefficients_that_no_dtype_holds(backend, dtype):
    """1 / L of a loss that is far smaller than the floor of others: elements without a gradient would become NaN."""
    p, q = (nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2))
    optimizer = dk.DTOAdamW([p, q], loss_floor=1e-320)
    before = [p.detach().clone(), q.detach().clone()]
    tiny = 1e-39 if dtype is not torch.float64 else 1e-305
    optimizer.backward([loss(p, 0.0, tiny) + 0 * q.sum(), loss(q, 1.0, 1.0) + 0 * p.sum()])
    optimizer.step()
    assert torch.equal(p, before[0])
    assert q.isfinite().all()


@each_rule
@pytest.mark.parametrize("shape", [(300,), (70000,)], ids=str)
def test_float16_steps_that_fit_are_taken(backend, make, shape):
    """A direction longer than 65504's root, whose elements all fit, is no reason to skip."""
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float16))
    optimizer = make([p], weighting=RAW)
    step(optimizer, p, [20.0, 10.0])
    assert optimizer.balance.norm > 256
    assert not optimizer.balance.skipped
    assert (p != 0).all()


@pytest.mark.parametrize("master_weights", [False, True])
def test_float16_state_that_adds_up(backend, master_weights):
    """Each direction fits; the momentum buffer, and then the parameter, would leave float16."""
    p = nn.Parameter(torch.zeros(5, dtype=torch.float16))
    q = nn.Parameter(torch.zeros(4, dtype=torch.float32))
    options = {"lr": 1.0, "momentum": 0.99, "weighting": RAW, "rescale": "none", "master_weights": master_weights}
    optimizer = dk.DTOSGD([p, q], **options)
    skipped = []
    for _ in range(12):
        before = copy.deepcopy(everything(optimizer))
        optimizer.zero_grad()
        optimizer.backward([loss(p, 3000.0, 1.0) + q.sum(), loss(p, 1000.0, 1.0) + q.sum()])
        optimizer.step()
        skipped.append(bool(optimizer.balance.skipped))
        assert all(t.isfinite().all() for t in everything(optimizer))
        if skipped[-1]:  # the float32 parameter neither
            assert all(torch.equal(a, b) for a, b in zip(before, everything(optimizer), strict=True))
    # sums of -4000 t, each buffer 0.99 of the last: -4000, -11960, -23840, -39602, -59206, then beyond 65504
    assert skipped == [False] * 5 + [True] * 7
    assert optimizer.skipped_steps == 7


def test_float16_parameters_that_move_too_far(backend):
    """Steps of lr, about, until the parameter would be infinite; whatever its moments' dtype."""
    for more in ({}, {"state_dtype": torch.float32}, {"master_weights": True}):
        p = nn.Parameter(torch.zeros(3, dtype=torch.float16))
        optimizer = dk.DTOAdamW([p], lr=1e4, weight_decay=0.0, weighting=RAW, **more)
        for _ in range(10):
            step(optimizer, p, [0.5, 0.5])
            assert all(t.isfinite().all() for t in everything(optimizer))
        assert 3 <= optimizer.skipped_steps <= 5  # six steps of 1e4 fit below 65504
        assert (p < -55000).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_infinite_parameter_without_weight_decay_stays_so(backend, momentum, dtype):
    """As torch's SGD leaves it: 0 times infinity would be NaN. A mask of attention is such a parameter."""
    ours, theirs = (nn.Parameter(torch.tensor([torch.inf, -torch.inf, 1.0], dtype=dtype)) for _ in range(2))
    optimizer = dk.DTOSGD([ours], lr=0.5, momentum=momentum, weighting=RAW, rescale="none")
    plain = torch.optim.SGD([theirs], lr=0.5, momentum=momentum)
    for _ in range(2):
        step(optimizer, ours, [0.25, 0.25])
        theirs.grad = torch.full_like(theirs, 0.5)
        plain.step()
    assert torch.equal(ours, theirs)
    assert ours.isinf().tolist() == [True, True, False]


@each_rule
def test_random_scales(backend, make):
    """Whatever the scales, what is written is finite, and a step is skipped only if a number of it could not be."""
    generator = torch.Generator().manual_seed(0)
    taken = skipped = 0
    for dtype, seed in itertools.product(DTYPES, range(12)):
        top = torch.finfo(dtype).max
        p = nn.Parameter(torch.randn(33, generator=generator).to(dtype))
        optimizer = make([p])
        for _ in range(3):
            power = torch.rand((), generator=generator).item() * 2 - 1
            gradient, value = min(top / 4, 10.0 ** (power * 40)), 10.0 ** (-8 + 9 * (seed % 3))
            gradient = max(gradient, torch.finfo(dtype).tiny)
            before = copy.deepcopy(everything(optimizer))
            step(optimizer, p, [gradient, -gradient / 3], value)
            assert all(t.isfinite().all() for t in everything(optimizer))
            direction = gradient / max(value, 1e-8)
            if optimizer.balance.skipped:
                skipped += 1
                assert all(torch.equal(a, b) for a, b in zip(before, everything(optimizer), strict=False))
                # float16 steps may fail by what they add to; others by their direction alone
                assert dtype is torch.float16 or 2 * direction > limit_of([dtype]) or optimizer.balance.norm == 0
            else:
                taken += 1
    assert taken > 40
    assert skipped > 15


@each_dtype
def test_backward_for_other_optimizers(backend, dtype):
    """`.grad` stays as it was, None or a number."""
    gradient, value = TOO_LARGE[dtype]
    for before in (None, 2.0):
        p = nn.Parameter(torch.ones(9, dtype=dtype))
        p.grad = None if before is None else torch.full_like(p, before)
        record = dk.backward([loss(p, gradient, value), loss(p, gradient / 2, value)], [p])
        assert record.skipped
        assert p.grad is None if before is None else (p.grad == before).all()


def test_clipping_makes_it_fit(backend):
    p = nn.Parameter(torch.ones(9))
    optimizer = dk.DTOAdamW([p], max_norm=1.0)
    step(optimizer, p, [3e37, 1e37])
    assert not optimizer.balance.skipped
    assert (p != 1).all()


def test_eps_of_zero(backend):
    """0 / 0 where no gradient has been: nothing is written, and as soon as all have one, steps are taken."""
    p = nn.Parameter(torch.ones(4))
    optimizer = dk.DTOAdamW([p], eps=0.0)
    for gradient in ([1.0, 0.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]):
        before = copy.deepcopy(everything(optimizer))
        optimizer.zero_grad()
        optimizer.backward([(p * torch.tensor(gradient)).sum() + 9])
        optimizer.step()
        assert bool(optimizer.balance.skipped) is (0.0 in gradient)
        if optimizer.balance.skipped:
            assert all(torch.equal(a, b) for a, b in zip(before, everything(optimizer), strict=False))
    assert p.isfinite().all()


def test_infinite_parameter_of_float16(backend):
    """It was there before: others train on, as with torch."""
    p = nn.Parameter(torch.tensor([1.0, -torch.inf], dtype=torch.float16))
    optimizer = dk.DTOSGD([p], lr=0.1)
    optimizer.backward([(p[:1] * 2).sum() + 9])
    optimizer.step()
    assert not optimizer.balance.skipped
    assert p[0] < 1
