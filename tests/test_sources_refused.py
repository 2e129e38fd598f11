"""Choices of a source that cannot work are refused by name, and change nothing."""

import pytest
import torch
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels.sources import Ema, Every, Feature, Probe

from .oracle import Student, batch, losses_of
from .sources import assert_same, copies, each_optimizer

BAD = {
    "name": ("exakt", r"gram is 'exakt'; choose one of 'exact', 'overlap', 'lag'"),
    "type": (3, r"gram is 3; pass one of 'exact', 'overlap', 'lag'"),
    "none": ("none", r"gram is 'none', but weighting DTO\(.*\) needs the Gram matrix; choose another"),
}


@pytest.mark.parametrize("op", ["DTOAdamW", "DTOSGD", "backward"])
@pytest.mark.parametrize("case", BAD)
def test_bad_choice(case, op):
    gram, message = BAD[case]
    w = nn.Parameter(torch.ones(2))
    with pytest.raises((TypeError, ValueError), match=f"^{op}: {message}"):
        dk.backward([w.sum()], [w], gram=gram) if op == "backward" else getattr(dk, op)([w], gram=gram)
    assert w.grad is None


BAD_PARTS = {
    "n": (lambda: Every(0), r"Every: n is 0; pass a positive number of steps"),
    "n float": (lambda: Every(2.5), r"Every: n is 2.5; pass a positive number of steps"),
    "beta": (lambda: Ema(1.0), r"Ema: beta is 1.0; pass a number from 0 to below 1"),
    "source": (lambda: Ema(0.5, "exakt"), r"Ema: source is 'exakt'; choose one of"),
    "source type": (lambda: Every(2, 7), r"Every: source is 7; pass one of"),
    "source none": (lambda: Every(2, "none"), r"Every: source is 'none', which measures no Gram matrix"),
    "no parameter": (lambda: Probe(nn.ReLU()), r"Probe: ReLU\(\) has no parameter; probe the last block"),
    "probe type": (lambda: Probe(["trunk"]), r"Probe: of holds a str; pass modules or parameters"),
    "feature type": (lambda: Feature(torch.ones(2)), r"Feature: of is a Tensor; pass the module whose output"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_bad_parts(case):
    make, message = BAD_PARTS[case]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        make()


BAD_CALLS = {
    "probe of others": (
        lambda m: Probe(nn.Linear(2, 2)), None, r"gram=Probe\(.*\) matches no parameter that is optimized",
    ),
    "probe of a head": (
        lambda m: Probe(m.head), None, r"no parameter of gram=Probe\(.*\) is reached by all objectives \['task', 'dist",
    ),
    "no features": (lambda m: Feature(), None, r"gram=Feature\(\) has no features for this call; pass backward\("),
    "not run": (lambda m: Feature(nn.ReLU()), None, r"gram=Feature\(ReLU\) has no features for this call; run its"),
    "detached": (lambda m: Feature(), lambda h: h.detach(), r"features\[0\] is a tensor without gradient"),
    "no tensor": (lambda m: Feature(), lambda h: [3], r"features\[0\] is a int; pass the tensor"),
    "elsewhere": (
        lambda m: Feature(), lambda h: h * 2, r"objective 'task' was not computed from the features of gram=Feature",
    ),
}  # fmt: skip


@each_optimizer
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_change_nothing(backend, case, make):
    source, features, message = BAD_CALLS[case]
    model = Student()
    optimizer = make(model.parameters(), gram=source(model))
    before = copies(model.parameters())
    losses = losses_of(model, batch())
    z = None if features is None else features(model.trunk(batch()[0]))
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.backward(losses, features=z)
    assert optimizer.objectives == ()
    assert_same(model.parameters(), before)
    assert not optimizer.state_dict()["state"]
    losses["task"].backward()  # the graph is whole
