"""An objective at its lower bound is left out, whatever measures the Gram matrix."""

import pytest
import torch
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels.sources import Every

from .oracle import Student, batch, losses_of
from .sources import SOURCES, copies

EPS = torch.finfo(torch.float64).eps


BOUNDED_WEIGHTINGS = {
    "dto": dk.weighting.DTO,
    "affine": lambda: dk.weighting.DTO(clamp=False),
    "mgda": lambda: dk.weighting.DTO(log_gradients=False),
    "logsum": dk.weighting.LogSum,
    "fixed": lambda: dk.weighting.Fixed([0.3, 0.7]),
    "rlw": dk.weighting.RLW,
    "rlw log": lambda: dk.weighting.RLW(log_gradients=True),
    "famo": dk.weighting.Amortized,
    "eq18": lambda: dk.weighting.Amortized("eq18"),
    "gram": lambda: dk.weighting.Amortized("gram"),
    "uncertainty": dk.weighting.UncertaintyWeighting,
    "nash": lambda: dk.weighting.NashMTL(log_gradients=True),
}


def at_bound(losses):
    """The losses, the last one clamped at its lower bound as the guide advises: a constant with a graph."""
    *rest, (name, loss) = losses.items()
    return {**dict(rest), name: (loss - 1e9).clamp(min=1e-7)}


@pytest.mark.parametrize("rescale", ["none", "sum"])
@pytest.mark.parametrize("make_weighting", BOUNDED_WEIGHTINGS.values(), ids=BOUNDED_WEIGHTINGS)
@pytest.mark.parametrize("source", [lambda model: None, *SOURCES.values()], ids=["default", *SOURCES])
def test_objective_at_its_bound_is_left_out(source, make_weighting, rescale):
    """It has no coefficient and no share of the sum, however the Gram matrix is obtained; others train on."""
    model, lr = Student(), 1e-3
    weighting = make_weighting()
    optimizer = dk.DTOSGD(model.parameters(), lr=lr, weighting=weighting, rescale=rescale, gram=source(model))
    for step in range(9):
        losses = losses_of(model, batch(step))
        if bounded := 2 <= step < 7:
            losses = at_bound(losses)
        params = list(model.parameters())
        grads = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in losses.values()]
        before = copies(params)
        optimizer.zero_grad()
        optimizer.backward(losses)
        one_pass = len(optimizer._sets.grads) == 1
        optimizer.step()
        record = optimizer.balance
        assert not record.skipped
        for p, b, *own in zip(params, before, *grads, strict=True):
            shared = one_pass or all(g is not None for g in own)
            c = record.coefficients if shared else record.private_coefficients
            expected = b - lr * sum(c[i] * g for i, g in enumerate(own) if g is not None)
            assert (p - expected).abs().max() <= 1e-12 * (1 + c.abs().max())
        if not bounded:
            assert (record.weights != 0).any()
        elif one_pass and not getattr(weighting, "log_gradients", True):
            assert not torch.equal(params[0], before[0])  # its loss says nothing: weights of raw gradients as ever
        else:
            assert record.weights[1] == record.coefficients[1] == 0
            if rescale == "sum":
                assert (record.coefficients[0] - 1).abs() <= EPS
            else:
                scale = 1 / losses["task"] if getattr(weighting, "log_gradients", True) else 1.0
                assert (record.coefficients[0] - record.weights[0] * scale).abs() <= 4 * EPS * scale
            assert record.weights[0] > 0


def test_kept_weights_of_objectives_at_their_bound_alone(backend):
    """Every kept all weight for one objective that is then at its bound: the three others count alike."""
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    last = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    optimizer = dk.DTOSGD([w], lr=0.0, weighting=lambda gram: last, gram=Every(3), rescale="none")
    for _ in range(2):
        losses = {name: (w + i).square().sum() + 1 for i, name in enumerate("abcd")}
        optimizer.zero_grad()
        optimizer.backward(at_bound(losses) if optimizer.balance else losses)
        optimizer.step()
    assert optimizer.balance.weights.tolist() == [1 / 3, 1 / 3, 1 / 3, 0.0]
    assert not optimizer.balance.skipped


@pytest.mark.parametrize("reading", ["famo", "eq18"])
@pytest.mark.parametrize("observed", [False, True])
def test_weights_are_not_learned_of_an_objective_at_its_bound(reading, observed):
    """What is learned is what the two others alone would have taught."""
    logits = []
    for third in (True, False):
        torch.manual_seed(3)
        w = nn.Parameter(torch.randn(4, dtype=torch.float64))
        weighting = dk.weighting.Amortized(reading, weight_decay=0.0)
        optimizer = dk.DTOSGD([w], lr=1e-2, weighting=weighting)

        def losses(w=w, third=third):
            two = {"a": (w - 1).square().sum() + 1, "b": 3 * (w + 1).square().sum()}
            return at_bound({**two, "c": w.sum()}) if third else two

        for _ in range(40):
            optimizer.zero_grad()
            optimizer.backward(losses())
            optimizer.step()
            if observed and reading == "famo":
                weighting.observe({name: loss.detach() for name, loss in losses().items()})
        logits.append(weighting.state_dict()["learned"])
    assert logits[0][2] == 0
    assert (logits[0][:2] - logits[1]).abs().max() <= 1e-12
    assert logits[1].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [1, 4])
def test_bound_in_each_dtype_and_in_parts(dtype, parts):
    w = nn.Parameter(torch.ones(3))
    optimizer = dk.DTOSGD([w], weighting=dk.weighting.LogSum())
    for _ in range(parts):
        optimizer.backward([w.square().sum() / parts, (0 * w.sum()).to(dtype).clamp(min=1e-7).double() / parts])
    optimizer.step()
    assert optimizer.balance.coefficients[1] == 0
    assert optimizer.balance.coefficients[0] == 1


def test_small_losses_are_no_bound_where_the_floor_is_lower():
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    kept = {"default": (1e-8, {}), "lower": (1e-8, {"loss_floor": 1e-12}), "higher": (1e-3, {"loss_floor": 1.0})}
    weights = {}
    for name, (size, options) in kept.items():
        optimizer = dk.DTOSGD([w], lr=0.0, weighting=dk.weighting.LogSum(), **options)
        optimizer.backward([w.square().sum(), size * w.square().sum()])
        optimizer.step()
        weights[name] = optimizer.balance.weights.tolist()
    assert weights == {"default": [0.5, 0.0], "lower": [0.5, 0.5], "higher": [0.5, 0.5]}


def test_all_objectives_at_their_bound():
    w = nn.Parameter(torch.ones(3))
    for weighting in (dk.weighting.LogSum(), dk.weighting.Amortized()):
        optimizer = dk.DTOSGD([w], weighting=weighting)
        optimizer.backward(at_bound({"a": w.sum()}))
        optimizer.step()
        assert optimizer.balance.skipped
