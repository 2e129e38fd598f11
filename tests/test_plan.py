"""Which implementation updates which parameter: decided when the plan is made, and what kernels lack is said once."""

import warnings

import pytest
import torch
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels import backends
from dtokd_kernels.plan import Plan
from dtokd_kernels.rows import Layout
from dtokd_kernels.rules import RULES

cpu_kernels = pytest.mark.skipif(backends.missing("cpu") is not None, reason="no extension")
LACKING = {
    "masters": ({"master_weights": True}, torch.bfloat16, "master copies"),
    "state": ({"state_dtype": torch.bfloat16}, torch.float32, "state of torch.bfloat16 beside parameters of torch.fl"),
}


def student(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)


def take_step(optimizer, model, seed=0):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
    out = model(x).float()
    optimizer.zero_grad()
    optimizer.backward([out.square().mean(), (out - 1).square().mean()])
    optimizer.step()


def caught(run):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in found]


@cpu_kernels
@pytest.mark.parametrize("case", LACKING)
def test_what_kernels_lack_is_told_once_and_by_name(case):
    options, dtype, lacking = LACKING[case]
    model = student(dtype)
    optimizer = dk.DTOAdamW(model.parameters(), lr=1e-2, backend="cpu", **options)
    [message] = caught(lambda: [take_step(optimizer, model, seed) for seed in range(3)])
    assert message.startswith("DTOAdamW.step: 4 of 4 parameters (numbers 0, 1, 2, 3) are updated in plain torch")
    assert f"backend 'cpu' has no kernel for {lacking}" in message
    assert "backend='reference'" in message
    asked_for = dk.DTOAdamW(model.parameters(), lr=1e-2, backend="reference", **options)
    assert not caught(lambda: take_step(asked_for, model))


@cpu_kernels
def test_only_the_rows_that_kernels_lack_take_the_reference():
    model = student()
    model[0].weight.data = model[0].weight.data.repeat_interleave(2, -1)[..., ::2]
    optimizer = dk.DTOAdamW(model.parameters(), lr=1e-2, backend="cpu")
    [message] = caught(lambda: take_step(optimizer, model))
    assert "1 of 4 parameters (numbers 0)" in message
    assert "gaps in memory" in message
    parts = optimizer._plan[1].parts
    assert {part.by.name: part.places for part in parts} == {"reference": [0], "cpu": [1, 2, 3]}


@cpu_kernels
def test_a_plan_is_kept_from_step_to_step():
    model = student()
    optimizer = dk.DTOAdamW(model.parameters(), lr=1e-2, backend="cpu")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    take_step(optimizer, model)
    parts = optimizer._plan[1].parts
    take_step(optimizer, model)
    schedule.step()
    take_step(optimizer, model)
    assert optimizer._plan[1].parts is parts


def replaced_state(optimizer, model):
    p = model[0].weight
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].clone()


def moved_parameter(optimizer, model):
    model[0].weight.data = model[0].weight.data.clone()


def other_dtype(optimizer, model):
    model.double()
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].double()


def other_layout(optimizer, model):
    p = model[0].weight
    p.data = p.data.t().contiguous().t()
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[p][name] = optimizer.state[p][name].t().contiguous().t()


def loaded(optimizer, model):
    optimizer.load_state_dict(optimizer.state_dict())


def amsgrad(optimizer, model):
    optimizer.param_groups[0]["amsgrad"] = True


def frozen(optimizer, model):
    model[0].weight.requires_grad_(False)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize(
    "change", [replaced_state, moved_parameter, other_dtype, other_layout, loaded, amsgrad, frozen]
)
def test_a_plan_follows_what_has_changed(change, name):
    """A step after a change is that of an optimizer that never had a plan before it."""
    if backends.missing(name):
        pytest.skip("no extension")
    results = []
    for fresh in (False, True):
        model = student()
        optimizer = dk.DTOAdamW(model.parameters(), lr=1e-2, backend=name)
        take_step(optimizer, model)
        change(optimizer, model)
        if fresh:
            optimizer._plan = None
        take_step(optimizer, model, 1)
        state = [t for p in model.parameters() for t in optimizer.state[p].values()]
        results.append([*(p.detach() for p in model.parameters()), *state])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@cpu_kernels
def test_a_plan_that_is_gone_frees_what_it_held():
    model = student()
    optimizer = dk.DTOAdamW(model.parameters(), lr=1e-2, backend="cpu")
    take_step(optimizer, model)
    number = optimizer._plan[1].parts[0].rows.prepared["dtokd"]
    optimizer._plan = None
    take_step(optimizer, model)
    with pytest.raises(RuntimeError, match="stands for nothing that was prepared"):
        torch.ops.dtokd.update_.default(
            number, [], torch.ones(3, 2).double(), torch.tensor(False), [], [], [], False, None
        )


@pytest.mark.parametrize("reaches", [(True, True, True), (True, True, False), (False, True, True)])
def test_gradients_of_a_plan_go_row_by_row(reaches):
    """Also where an objective reaches nothing, and where all reach everything, which has a shorter way."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    sets = [[torch.full((2,), 10.0 * i + t) if there else None for t in range(3)] for i, there in enumerate(reaches)]
    reach = sum(1 << i for i, there in enumerate(reaches) if there)
    layout = Layout([reach] * 3, [0] * 3, torch.device("cpu"))
    plan = Plan(RULES["sgd"], params, [0, 1, 2], [0, 0, 0], layout)
    expected = [row[t] for t in range(3) for row in sets if row[t] is not None]
    assert [id(g) for g in plan.gradients(sets).grads] == [id(g) for g in expected]
