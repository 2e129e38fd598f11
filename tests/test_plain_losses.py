"""Losses go in as they are: `share=` and `scaler=` in every mode, against one big batch and against plain code."""

import copy
import fractions

import pytest
import torch

import dtokd_kernels as dk
from dtokd_kernels.sources import Every, Feature, Probe

from . import tolerances
from .oracle import Student, balanced, batch, losses_of, nothing_with_gradient
from .sources import SOURCES as MEASURING

#: From a model to what `gram=` takes.
SOURCES = MEASURING | {
    "every lag": lambda model: Every(2, "lag"),
    "every feature": lambda model: Every(2, Feature(model.trunk)),
    "none": lambda model: "none",
}
each_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
WEIGHTINGS = {
    "dto": dk.weighting.DTO,
    "mgda": lambda: dk.weighting.DTO(log_gradients=False),
    "fixed": lambda: dk.weighting.Fixed([0.3, 0.7]),
    "logsum": dk.weighting.LogSum,
    "famo": lambda: dk.weighting.Amortized("famo"),
    "nash": dk.weighting.NashMTL,
}


def make(model, source, **options):
    gram = source(model)
    if gram == "none":
        options = {"weighting": dk.weighting.LogSum(), **options}
    return dk.DTOSGD(model.parameters(), lr=0.01, momentum=0.9, gram=gram, **options)


def parts_of(step, n):
    return zip(*(t.chunk(n) for t in batch(step)), strict=True)


@pytest.mark.parametrize("rescale", ["none", "sum"])
@each_source
def test_a_scale_changes_nothing(backend, source, rescale):
    """A power of 2: not even the rounding is another. Numbers of the balance are those of the losses as they are."""
    ends = []
    for enabled in (False, True):
        model, scaler = Student(), torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=enabled)
        optimizer = make(model, source, rescale=rescale, max_norm=0.5)
        for step in range(5):
            for data in parts_of(step, 2):
                optimizer.backward(losses_of(model, data), share=0.5, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        record = optimizer.balance
        numbers = [record.weights, record.table, record.gram, record.norms, record.norm]
        ends.append([*(p.detach() for p in model.parameters()), *numbers])
    assert scaler.get_scale() == 2.0**12
    allowed = tolerances.REORDERED if backend == "cuda" else 0.0  # which takes other launches with a scale
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=allowed, atol=allowed, equal_nan=True)


@each_source
def test_every_source_reports_an_overflow(backend, source):
    """In any step, whatever it measures: nothing changes, the scale is halved, and the loop goes on."""
    for overflowing in range(4):
        for reached in ("trunk.weight", "projector.weight"):
            model, scaler = Student(), torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
            optimizer = make(model, source)
            for step in range(6):
                losses = losses_of(model, batch(step))
                if step == overflowing:
                    losses["distill"] = losses["distill"] + nothing_with_gradient(
                        model.get_parameter(reached), torch.inf
                    )
                before = copy.deepcopy((list(model.parameters()), optimizer.state_dict()["state"]))
                optimizer.backward(losses, scaler=scaler)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                same = all(map(torch.equal, before[0], model.parameters()))
                assert same is (step == overflowing)
                assert bool(optimizer.balance.skipped) is same
            assert scaler.get_scale() == 2.0**9
            assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("scaled", [False, True])
def test_accumulated_losses_are_those_of_one_batch(backend, scaled):
    """Log-gradients of the mean over the batch, against plain code on the whole of it."""
    model = Student()
    params = list(model.parameters())
    expected = balanced(list(losses_of(model, batch()).values()), params)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    optimizer = dk.DTOSGD(params, lr=1.0, rescale="none")
    for data in parts_of(0, 4):
        optimizer.backward(losses_of(model, data), share=0.25, scaler=scaler)
    before = [p.detach().clone() for p in params]
    scaler.step(optimizer)
    for p, b, d in zip(params, before, expected.directions, strict=True):
        if d is not None:
            assert ((b - p.detach()) - d).abs().max() <= expected.tolerance + 1e-14


@pytest.mark.parametrize(
    ("source", "name"),
    [
        *(("none", name) for name in ("fixed", "logsum", "famo")),
        *((source, name) for source in ("probe", "feature", "every") for name in WEIGHTINGS),
    ],
)
def test_float16_with_one_pass(backend, name, source):
    """Float16 autocast, gradients that would underflow, unequal parts: as plain code in float32.

    Plain code takes the losses of each part times the coefficients that this part was weighed with, and its share.
    """
    small, shares = 1e-4, (0.5, 0.25, 0.125, 0.125)
    model = Student(torch.float32)
    params = list(model.parameters())
    gram = {"none": None, "probe": Probe(model.trunk), "feature": Feature(model.trunk), "every": Every(100)}[source]
    optimizer = dk.DTOSGD(params, lr=0.0, rescale="none", weighting=WEIGHTINGS[name](), gram=gram)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)

    def losses(data, autocast):
        x, y, z = (t.float() for t in data)
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            task, distill = model(x)
        return {
            "task": small * (task.float() - y).square().mean(),
            "distill": 5 * small * (distill.float() - z).square().mean(),
        }

    checked = 0
    while checked < 2 and scaler.get_scale() > 1:  # the first steps overflow, and lower the scale
        optimizer.zero_grad()
        expected = [torch.zeros_like(p) for p in params]
        scale = scaler.get_scale()
        for data, share in zip(parts_of(checked, 4), shares, strict=True):
            optimizer.backward(losses(data, True), share=share, scaler=scaler)
            if (weighed := optimizer._sets.weighed) is not None:
                plain = [c * v for c, v in zip(weighed.coefficients, losses(data, False).values(), strict=True)]
                gradients = torch.autograd.grad(share * sum(plain), params, allow_unused=True)
                for total, g in zip(expected, gradients, strict=True):
                    total += 0 if g is None else g
        made = optimizer._sets.grads
        scaler.step(optimizer)
        scaler.update()
        if optimizer.balance.skipped or len(made) > 1:  # `Every` measures once
            continue
        # 2 layers, forth and back, of sums of at most 8 products of float16 numbers
        allowed = 100 * 2.0**-11 * max(e.abs().max() for e in expected)
        for g, e in zip(made[0], expected, strict=True):
            assert g is None or (g / scale - e).abs().max() <= allowed
        checked += 1
    assert checked == 2


def test_shares_that_sum_to_more_than_one():
    """Of log-gradients in one pass the step would be too long, which dividing the losses does not mend."""
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), weighting=dk.weighting.LogSum())
    optimizer.backward(losses_of(model, batch()), share=0.5)
    before = copy.deepcopy(optimizer._sets.grads)
    with pytest.raises(ValueError, match="pass share=1/n to each of n calls"):
        optimizer.backward(losses_of(model, batch()))
    assert all(a is None or torch.equal(a, b) for a, b in zip(optimizer._sets.grads[0], before[0], strict=True))
    optimizer.backward(losses_of(model, batch()), share=0.5)
    optimizer.step()


@pytest.mark.parametrize("share", [0, -0.5, 1.5, "1/2", True, None, float("nan")])
def test_bad_share(share):
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters())
    with pytest.raises((TypeError, ValueError), match=r"DTOAdamW\.backward: share is"):
        optimizer.backward(losses_of(model, batch()), share=share)
    with pytest.raises((TypeError, ValueError), match=r"^backward: share is"):
        dk.backward(losses_of(model, batch()), model.parameters(), share=share)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("source", ["probe", "feature", "every probe"])
@pytest.mark.parametrize("filled", [False, True], ids=["optimizer", "backward"])
def test_a_measurement_that_overflows_lowers_the_scale(backend, source, filled):
    """The passes that measure have no small coefficient in front, so they overflow where the weighted sum does not."""
    torch.manual_seed(0)
    model = Student(torch.float32)
    made = {"probe": Probe(model.trunk), "feature": Feature(model.trunk), "every probe": Every(2, Probe(model.trunk))}
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=1e-3) if filled else dk.DTOSGD(params, lr=1e-3, gram=made[source])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before, taken = [p.detach().clone() for p in params], 0
    for step in range(30):
        x, y, z = (t.float() for t in batch(step))
        with torch.autocast("cpu", torch.float16):
            task, distill = model(x)
        losses = {"task": 240 * (task.float() - y).square().mean(), "kl": 160 * (distill.float() - z).square().mean()}
        optimizer.zero_grad()
        if filled:
            record = dk.backward(losses, params, gram=made[source], scaler=scaler)
        else:
            optimizer.backward(losses, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        taken += not (record if filled else optimizer.balance).skipped
        if not taken:
            assert all(map(torch.equal, params, before))
    assert 5 < taken < 30
    assert scaler.get_scale() < 2.0**16


@pytest.mark.parametrize("source", ["exact", "probe"])
def test_an_error_in_a_pass_leaves_no_half_batch(backend, source):
    model = Student()
    optimizer = dk.DTOSGD(model.parameters(), lr=0.1, gram=Probe(model.trunk) if source == "probe" else source)
    optimizer.backward(losses_of(model, batch()), share=0.5)
    losses = losses_of(model, batch(1))

    def fails(gradient):
        raise MemoryError("no memory")

    losses["distill"].register_hook(fails)
    with pytest.raises(MemoryError):
        optimizer.backward(losses, share=0.5)
    with pytest.raises(RuntimeError, match="there are no gradients"):
        optimizer.step()


def test_share_of_any_real_kind(backend):
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters())
    optimizer.backward(losses_of(model, batch()), share=fractions.Fraction(1, 2))
    optimizer.step()
