"""State: exchanged with torch's optimizers in the middle of a run, saved, copied and pickled."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import dtokd_kernels as dk

from . import tolerances
from .oracle import Student, batch, losses_of

RAW = dk.weighting.DTO(log_gradients=False)
CASES = {
    "adamw": (torch.optim.AdamW, dk.DTOAdamW, {"lr": 1e-2}),
    "adamw amsgrad": (torch.optim.AdamW, dk.DTOAdamW, {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, dk.DTOSGD, {"lr": 1e-2}),
    "sgd momentum": (torch.optim.SGD, dk.DTOSGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3}),
    "sgd nesterov": (torch.optim.SGD, dk.DTOSGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
}
HALF = 15


def is_ours(optimizer):
    return isinstance(optimizer, (dk.DTOAdamW, dk.DTOSGD))


def run(optimizer, model, first, last, each=None):
    """Steps first to last - 1 on the task's loss alone."""
    for step in range(first, last):
        optimizer.zero_grad()
        loss = losses_of(model, batch(step))["task"]
        optimizer.backward(loss) if is_ours(optimizer) else loss.backward()
        optimizer.step()
        if each is not None:
            each()


def run_two(optimizer, model, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch(step)))
        optimizer.step()


def saved_and_loaded(state):
    """Through a file, as a checkpoint goes; `weights_only` refuses anything but tensors and plain values."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def make(kind, model, case):
    theirs, ours, options = CASES[case]
    if kind == "torch":
        return theirs(model.parameters(), **options)
    if kind == "torch fused":
        return theirs(model.parameters(), fused=True, **options)
    if kind == "torch foreach":
        return theirs(model.parameters(), foreach=True, **options)
    return ours(model.parameters(), weighting=RAW, **options)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("torch", "ours"),
        ("torch fused", "ours"),
        ("torch foreach", "ours"),
        ("ours", "torch"),
        ("ours", "torch foreach"),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_exchange_with_torch_in_the_middle_of_a_run(backend, case, before, after):
    """HALF steps with one, its state_dict through a file into the other, HALF more: torch's run without a change."""
    whole, shaken, model = Student(), Student(), Student()
    run(make("torch", whole, case), whole, 0, 2 * HALF)
    optimizer = make("torch", shaken, case)
    generator = torch.Generator().manual_seed(1)
    reached = [p for m in (shaken.trunk, shaken.head) for p in m.parameters()] + [shaken.scale]
    run(optimizer, shaken, 0, 2 * HALF, each=lambda: tolerances.shake(reached, generator))
    allowed = tolerances.drift([p.detach() for p in whole.parameters()], [p.detach() for p in shaken.parameters()])

    first = make(before, model, case)
    run(first, model, 0, HALF)
    second = make(after, model, case)
    second.param_groups[0]["lr"] = 123.0  # comes with the state
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    run(second, model, HALF, 2 * HALF)
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (p - q).abs().max().item() <= allowed, name


def options_of(case):
    _, ours, options = CASES[case]
    more = {"max_norm": 0.5, "rescale": "sum", "private": "balanced", "loss_floor": 1e-3}
    return ours, {**options, **more, "weighting": dk.weighting.DTO(clamp=False)}


@pytest.mark.parametrize("case", CASES)
def test_own_state_goes_on_to_the_bit(backend, case):
    cls, options = options_of(case)
    whole, model = Student(), Student()
    run_two(cls(whole.parameters(), **options), whole, 0, 2 * HALF)
    first = cls(model.parameters(), **options)
    run_two(first, model, 0, HALF)
    second = cls(model.parameters(), **options)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    run_two(second, model, HALF, 2 * HALF)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "deepcopy with gradients gathered"])
@pytest.mark.parametrize("case", CASES)
def test_copies_go_on_to_the_bit(backend, case, how):
    """Model and optimizer copied together; the copy has the options, and none of the gathered gradients."""
    cls, options = options_of(case)
    model = Student()
    optimizer = cls(model.parameters(), **options)
    run_two(optimizer, model, 0, HALF)
    if how.endswith("gathered"):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch(HALF)))
    pair = (model, optimizer)
    model2, optimizer2 = pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
    assert optimizer2.balance is None
    assert optimizer2.objectives == ()
    assert optimizer2.skipped_steps == 0
    with pytest.raises(RuntimeError, match=r"step: there are no gradients"):
        optimizer2.step()
    run_two(optimizer, model, HALF, 2 * HALF)
    run_two(optimizer2, model2, HALF, 2 * HALF)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), model2.parameters(), strict=True))
    assert not any(p is q for p, q in zip(model.parameters(), model2.parameters(), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_names_of_state_are_those_of_torch(backend, case):
    theirs, ours, options = CASES[case]
    expected = {
        "adamw": {"step", "exp_avg", "exp_avg_sq"},
        "adamw amsgrad": {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
        "sgd": set(),
        "sgd momentum": {"momentum_buffer"},
        "sgd nesterov": {"momentum_buffer"},
    }[case]
    model = Student()
    optimizer = ours(model.parameters(), **options)
    run_two(optimizer, model, 0, 2)
    assert set(optimizer.state[model.trunk.weight]) == expected
    saved = optimizer.state_dict()["param_groups"][0].keys()
    assert saved == theirs(model.parameters(), **options).state_dict()["param_groups"][0].keys() | {"balance"}


@pytest.mark.parametrize("case", ["adamw", "sgd momentum"])
def test_balance_of_a_group_is_saved(backend, case):
    _, ours, options = CASES[case]
    model = Student()
    groups = [{"params": [model.scale], "balance": False}, {"params": list(model.trunk.parameters())}]
    optimizer = ours(groups, **options)
    state = saved_and_loaded(optimizer.state_dict())
    assert [g["balance"] for g in state["param_groups"]] == [False, True]
    other = ours([{**g, "balance": True} for g in groups], **options)
    other.load_state_dict(state)
    assert [g["balance"] for g in other.param_groups] == [False, True]


@pytest.mark.parametrize("case", ["adamw", "sgd momentum"])
def test_balance_of_a_group_survives_a_state_of_torch(backend, case):
    """torch's state says nothing about the balance: loading it must not put a group back into the Gram matrix."""
    theirs, ours, options = CASES[case]
    model = Student()
    groups = [{"params": [model.scale]}, {"params": list(model.trunk.parameters())}]
    optimizer = ours([{**groups[0], "balance": False}, groups[1]], **options)
    optimizer.load_state_dict(theirs(groups, **options).state_dict())
    assert [g["balance"] for g in optimizer.param_groups] == [False, True]


def test_state_dict_hooks(backend):
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters())
    run_two(optimizer, model, 0, 1)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "more": 1})
    state = optimizer.state_dict()
    assert state["more"] == 1
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append("load") or {k: s[k] for k in s if k != "more"})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    optimizer.load_state_dict(state)
    assert seen == ["save", "load", "loaded"]


def test_hooks_see_the_memories(backend):
    """What weighting and source remember: in the state before hooks see it, loaded before hooks after that run."""
    model, other = Student(), Student()
    optimizer = dk.DTOAdamW(model.parameters(), weighting=dk.weighting.Amortized("gram"), gram=dk.sources.Ema(0.5))
    run_two(optimizer, model, 0, 2)
    seen = []
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append(sorted(state)) or {"wrapped": state})
    state = optimizer.state_dict()
    assert seen == [["gram", "param_groups", "reach", "state", "weighting"]]
    assert state.keys() == {"wrapped"}
    resumed = dk.DTOAdamW(other.parameters(), weighting=dk.weighting.Amortized("gram"), gram=dk.sources.Ema(0.5))
    resumed.register_load_state_dict_pre_hook(lambda o, state: state["wrapped"])
    resumed.register_load_state_dict_post_hook(
        lambda o: seen.append((o.weighting.state_dict(), o._source.state_dict()))
    )
    resumed.load_state_dict(saved_and_loaded(state))
    weighting, source = seen[-1]
    assert torch.equal(weighting["learned"], optimizer.weighting.state_dict()["learned"])
    assert torch.equal(source["total"], state["wrapped"]["gram"]["total"])


def with_other_moments(state):
    held = {i: {**of_one, "exp_avg": of_one["exp_avg"] + 1} for i, of_one in state["state"].items()}
    return {**state, "state": held}


BAD_STATES = {
    "gram": (
        lambda state: {**with_other_moments(state), "gram": {**state["gram"], "shares": 0.5}},
        r"'gram' of the state is not what state_dict\(\) returned",
    ),
    "reach": (
        lambda state: {**with_other_moments(state), "reach": None},
        r"'reach' of the state is not what state_dict\(\) returned",
    ),
    "wrapped": (
        lambda state: {"optimizer": state},
        r"the state has \['optimizer'\], expected 'state' and 'param_groups'",
    ),
    "balance": (
        lambda state: {**state, "param_groups": [{**state["param_groups"][0], "balance": "no"}]},
        r"balance of a group is 'no'; pass True or False",
    ),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states(backend, case):
    change, message = BAD_STATES[case]
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters(), gram=dk.sources.Ema(0.5))
    run_two(optimizer, model, 0, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((TypeError, ValueError), match=f"^DTOAdamW.load_state_dict: {message}"):
        optimizer.load_state_dict(change(optimizer.state_dict()))
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert all(torch.equal(t, after["state"][i][n]) for i, held in before["state"].items() for n, t in held.items())
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


def test_loading_leaves_gathered_gradients(backend):
    """As torch's load_state_dict leaves `.grad`: a step after it takes the loaded state and the gradients at hand."""
    a, b = Student(), Student()
    optimizer, other = dk.DTOAdamW(a.parameters()), dk.DTOAdamW(b.parameters())
    run_two(other, b, 0, 3)
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.copy_(q)
    optimizer.backward(losses_of(a, batch(3)))
    optimizer.load_state_dict(saved_and_loaded(other.state_dict()))
    optimizer.step()
    run_two(other, b, 3, 4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_state_that_does_not_fit_is_refused(backend):
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters())
    other = dk.DTOAdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(other.state_dict())


def test_state_takes_the_parameters_dtype(backend):
    """A float32 checkpoint in a bfloat16 model: state follows the parameters, the step counter stays float32."""
    a, b = Student(torch.float32), Student(torch.bfloat16)
    first = dk.DTOAdamW(a.parameters())
    first.backward(losses_of(a, batch(0, torch.float32)))
    first.step()
    second = dk.DTOAdamW(b.parameters())
    second.load_state_dict(first.state_dict())
    second.backward(losses_of(b, batch(1, torch.bfloat16)))
    second.step()
    state = second.state[b.trunk.weight]
    assert (state["exp_avg"].dtype, state["step"].dtype) == (torch.bfloat16, torch.float32)
    assert state["step"] == 2


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (dk.DTOAdamW, "exp_avg"),
        (dk.DTOAdamW, "exp_avg_sq"),
        (lambda params: dk.DTOAdamW(params, amsgrad=True), "max_exp_avg_sq"),
        (lambda params: dk.DTOAdamW(params, gram="lag"), "exp_avg"),
        (lambda params: dk.DTOSGD(params, momentum=0.9), "momentum_buffer"),
    ],
)
def test_moments_of_another_shape(backend, make, name):
    """As many numbers, of a parameter of another shape: refused where they are loaded, and in the step."""
    first, second = nn.Linear(4, 16, bias=False), nn.Linear(16, 4, bias=False)

    def losses():
        out = second(first(torch.ones(2, 4)).tanh())
        return [out.square().mean() + 1, (out - 1).square().mean()]

    def step(optimizer):
        optimizer.zero_grad()
        optimizer.backward(losses())
        optimizer.step()

    old, new = make([first.weight, second.weight]), make([second.weight, first.weight])
    step(old)
    step(new)
    before = copy.deepcopy((new.state_dict(), [p.detach() for p in (first.weight, second.weight)]))
    with pytest.raises(
        ValueError, match=r"has shape \[16, 4\], expected \[4, 16\]; load a state of the same parameters"
    ):
        new.load_state_dict(old.state_dict())
    torch.testing.assert_close(new.state_dict()["state"], before[0]["state"], rtol=0, atol=0)
    for p in (first.weight, second.weight):
        new.state[p][name] = new.state[p][name].T.contiguous()
    with pytest.raises((RuntimeError, ValueError)) as error:
        step(new)
    assert "csrc" not in str(error.value)
    assert all(map(torch.equal, (first.weight, second.weight), before[1]))
