"""With one objective, DTOAdamW and DTOSGD are torch.optim.AdamW and torch.optim.SGD, to rounding over 50 steps."""

import inspect

import pytest
import torch
from torch import nn

import dtokd_kernels as dk

from . import tolerances
from .oracle import Student, batch, losses_of

# torch's own lists of options; needs packages of its tests
common = pytest.importorskip("torch.testing._internal.common_optimizers", exc_type=ImportError)

STEPS = 50
RAW = dk.weighting.DTO(log_gradients=False)

# tensors in float64: torch computes with a float32 lr or beta in float32, here they are read as numbers
LR = torch.tensor(0.003, dtype=torch.float64)
BETAS = (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64))
ADAMW_INPUTS = {i.desc: i.kwargs for i in common.optim_inputs_func_adamw("cpu", torch.float64)} | {
    "tensor lr": {"lr": LR},
    "tensor betas": {"lr": LR, "betas": BETAS},
    "maximize amsgrad": {"maximize": True, "amsgrad": True, "lr": 0.01},
    "eps": {"eps": 1e-2},
    "beta1 0": {"betas": (0.0, 0.9)},
}
SGD_INPUTS = {i.desc: i.kwargs for i in common.optim_inputs_func_sgd("cpu", torch.float64)} | {
    "maximize nesterov": {"momentum": 0.8, "nesterov": True, "maximize": True},
    "everything": {"lr": 0.02, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.2},
}
CASES = [("adamw", name) for name in ADAMW_INPUTS] + [("sgd", name) for name in SGD_INPUTS]


def options_of(rule, name):
    return dict((ADAMW_INPUTS if rule == "adamw" else SGD_INPUTS)[name])


def torch_class(rule):
    return torch.optim.AdamW if rule == "adamw" else torch.optim.SGD


def ours_class(rule):
    return dk.DTOAdamW if rule == "adamw" else dk.DTOSGD


def loss_of(model, step, dtype):
    """One loss; with it the projector and `unused` have no gradient at all."""
    return losses_of(model, batch(step, dtype))["task"]


def take_step(optimizer, model, step, dtype):
    optimizer.zero_grad()
    loss = loss_of(model, step, dtype)
    if isinstance(optimizer, (dk.DTOAdamW, dk.DTOSGD)):
        optimizer.backward(loss)
    else:
        loss.backward()
    optimizer.step()


def train(make, dtype=torch.float64, steps=STEPS, shaken=False, each=None):
    """(optimizer, model) after `steps` steps; `each(optimizer, step)` runs after every one of them."""
    model = Student(dtype)
    optimizer = make(model)
    each = each(optimizer) if each is not None else lambda step: None
    generator = torch.Generator().manual_seed(99)
    for step in range(steps):
        take_step(optimizer, model, step, dtype)
        each(step)
        if shaken:
            tolerances.shake([p for n, p in model.named_parameters() if n != "unused"], generator)
    return optimizer, model


def assert_same_run(make_torch, make_ours, dtype=torch.float64, steps=STEPS, each=None):
    """Both runs end at the same parameters, as far apart at most as rounding carries two runs of torch's optimizer."""
    _, start = train(make_torch, dtype, 0)
    theirs, expected = train(make_torch, dtype, steps, each=each)
    _, shaken = train(make_torch, dtype, steps, shaken=True, each=each)
    ours, model = train(make_ours, dtype, steps, each=each)
    allowed = tolerances.drift(
        [p.detach() for n, p in expected.named_parameters() if n != "unused"],
        [p.detach() for n, p in shaken.named_parameters() if n != "unused"],
    )
    moved = max((p - q).abs().max().item() for p, q in zip(start.parameters(), expected.parameters(), strict=True))
    assert allowed < moved / 500  # or the comparison would say nothing
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (p - q).abs().max().item() <= allowed, name
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("rule", "name"), CASES)
def test_torch_optimizer_inputs(backend, rule, name, dtype):
    options = options_of(rule, name)
    ours, theirs = assert_same_run(
        lambda m: torch_class(rule)(m.parameters(), **options),
        lambda m: ours_class(rule)(m.parameters(), weighting=RAW, **options),
        dtype,
    )
    assert_same_kind_of_state(ours, theirs)


@pytest.mark.parametrize("name", SGD_INPUTS)
def test_dtosgd_as_it_comes(backend, name):
    """Its default rescale="sum" makes the coefficient of a single objective 1, log-gradients or not."""
    options = options_of("sgd", name)
    assert_same_run(
        lambda m: torch.optim.SGD(m.parameters(), **options), lambda m: dk.DTOSGD(m.parameters(), **options)
    )


@pytest.mark.parametrize("amsgrad", [False, True])
def test_dtoadamw_on_the_logarithm(backend, amsgrad):
    """As it comes, DTOAdamW with one loss is AdamW on log L."""

    class Log(torch.optim.AdamW):
        pass

    def take(optimizer, model, step):
        optimizer.zero_grad()
        loss = loss_of(model, step, torch.float64)
        optimizer.backward(loss) if isinstance(optimizer, dk.DTOAdamW) else loss.log().backward()
        optimizer.step()

    ends = []
    for make, shaken in ((Log, False), (Log, True), (dk.DTOAdamW, False)):
        model = Student()
        optimizer = make(model.parameters(), lr=1e-2, amsgrad=amsgrad)
        generator = torch.Generator().manual_seed(99)
        for step in range(STEPS):
            take(optimizer, model, step)
            if shaken:
                tolerances.shake(list(model.head.parameters()) + list(model.trunk.parameters()), generator)
        ends.append([p.detach() for p in model.parameters()])
    allowed = tolerances.drift(ends[0], ends[1])
    assert max((a - b).abs().max().item() for a, b in zip(ends[0], ends[2], strict=True)) <= allowed


def assert_same_kind_of_state(ours, theirs):
    """The same parameters have state, with the same names, shapes, dtypes, devices, layouts and step counters."""
    a, b = ours.state_dict()["state"], theirs.state_dict()["state"]
    filled = {k for k, v in b.items() if any(value is not None for value in v.values())}
    assert {k for k, v in a.items() if v} == filled
    for k in filled:
        assert a[k].keys() == b[k].keys()
        for name, value in b[k].items():
            assert (a[k][name].shape, a[k][name].dtype) == (value.shape, value.dtype), name
            # torch keeps counters on the CPU, or did
            assert name == "step" or a[k][name].device == value.device, name
            assert a[k][name].stride() == value.stride(), name
            if name == "step":
                assert a[k][name] == value


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_torch_error_inputs(rule):
    """Whatever torch refuses when an optimizer is made is refused in the same words."""
    errors = common.optim_error_inputs_func_adamw if rule == "adamw" else common.optim_error_inputs_func_sgd
    accepted = inspect.signature(ours_class(rule)).parameters
    tried = 0
    for error in errors("cpu", torch.float32):
        given = error.optimizer_error_input
        if not set(given.kwargs) <= set(accepted) - {"foreach", "fused"}:
            continue  # foreach and fused choose torch's implementation
        tried += 1
        params = [nn.Parameter(torch.ones(2, 2))] if given.params is None else given.params
        if issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=error.error_regex):
                ours_class(rule)(params, **given.kwargs)
        else:
            with pytest.raises(error.error_type, match=error.error_regex):
                ours_class(rule)(params, **given.kwargs)
    assert tried >= 7


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_is_a_torch_optimizer_with_its_defaults(rule):
    p = nn.Parameter(torch.ones(2))
    ours, theirs = ours_class(rule)([p]), torch_class(rule)([p])
    assert isinstance(ours, torch_class(rule))
    assert ours.defaults == theirs.defaults
    group = dict(ours.param_groups[0])
    assert group.pop("balance") is True
    assert group.keys() == theirs.param_groups[0].keys()
    assert "lr" in repr(ours)
    positional = [
        n for n, q in inspect.signature(theirs.__class__).parameters.items() if q.kind is q.POSITIONAL_OR_KEYWORD
    ]
    mine = [n for n, q in inspect.signature(ours.__class__).parameters.items() if q.kind is q.POSITIONAL_OR_KEYWORD]
    assert mine == positional[: len(mine)]  # so that positional arguments mean the same


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        ("adamw", {"lr": 1e-2, "weight_decay": 0.0}, {"betas": (0.5, 0.9), "amsgrad": True, "eps": 1e-3}),
        ("adamw", {"lr": 1e-2}, {"maximize": True}),
        ("sgd", {"lr": 0.05, "momentum": 0.9}, {"momentum": 0.0, "weight_decay": 0.1}),
        ("sgd", {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.5}),
    ],
)
def test_param_groups(backend, rule, first, second):
    def groups(m):
        return [
            {"params": list(m.trunk.parameters()), **first},
            {"params": [m.scale, m.unused, *m.head.parameters(), *m.projector.parameters()], **second},
        ]

    assert_same_run(
        lambda m: torch_class(rule)(groups(m), lr=2e-3), lambda m: ours_class(rule)(groups(m), lr=2e-3, weighting=RAW)
    )


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_add_param_group(backend, rule):
    """A group that joins in the middle of a run, as when layers thaw."""

    def make(cls, **options):
        def build(m):
            optimizer = cls(m.trunk.parameters(), lr=1e-2, **options)
            optimizer.late = list(m.head.parameters())
            return optimizer

        return build

    def each(optimizer):
        def after(step):
            if step == 20:
                optimizer.add_param_group({"params": optimizer.late, "lr": 2e-2})

        return after

    assert_same_run(make(torch_class(rule)), make(ours_class(rule), weighting=RAW), each=each)


@pytest.mark.parametrize("option", [{"decoupled_weight_decay": False}, {"differentiable": True}])
def test_options_of_torchs_groups_without_effect_are_refused(option):
    p, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    [name] = option
    with pytest.raises(ValueError, match=f"^DTOAdamW: {name} of a group is {option[name]}"):
        dk.DTOAdamW([{"params": [p], **option}])
    optimizer = dk.DTOAdamW([p])
    with pytest.raises(ValueError, match=f"^DTOAdamW: {name} of a group"):
        optimizer.add_param_group({"params": [late], **option})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_add_param_group_between_backward_and_step(backend, rule):
    """Gradients gathered so far stay with their parameters; the new ones wait for the next backward."""
    model = Student()
    optimizer = ours_class(rule)(model.trunk.parameters(), lr=1e-2, weighting=RAW)
    optimizer.backward(loss_of(model, 0, torch.float64))
    before = model.head.weight.detach().clone()
    optimizer.add_param_group({"params": list(model.head.parameters())})
    optimizer.step()
    assert torch.equal(model.head.weight, before)
    other = Student()
    plain = torch_class(rule)(other.trunk.parameters(), lr=1e-2)
    loss_of(other, 0, torch.float64).backward()
    plain.step()
    assert (model.trunk.weight - other.trunk.weight).abs().max() <= 16 * 2**-53
    optimizer.zero_grad()
    optimizer.backward(loss_of(model, 1, torch.float64))
    optimizer.step()
    assert not torch.equal(model.head.weight, before)


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 7, gamma=0.5),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=STEPS + 1),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[5],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_schedulers(backend, rule, name):
    options = {"lr": 1e-2} | ({"momentum": 0.9} if rule == "sgd" else {})

    def each(optimizer):
        scheduler = SCHEDULERS[name](optimizer)
        return lambda step: scheduler.step()

    assert_same_run(
        lambda m: torch_class(rule)(m.parameters(), **options),
        lambda m: ours_class(rule)(m.parameters(), weighting=RAW, **options),
        each=each,
    )


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_numbers_of_a_group_may_change(backend, rule):
    """Every number of a group is read anew in each step."""
    changes = {"lr": 0.02, "weight_decay": 0.3, "maximize": True} | (
        {"eps": 1e-3} if rule == "adamw" else {"momentum": 0.5}
    )

    def each(optimizer):
        def after(step):
            if step == 25:
                optimizer.param_groups[0].update(changes)

        return after

    options = {"lr": 1e-2} | ({"momentum": 0.9} if rule == "sgd" else {})
    assert_same_run(
        lambda m: torch_class(rule)(m.parameters(), **options),
        lambda m: ours_class(rule)(m.parameters(), weighting=RAW, **options),
        each=each,
    )


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_tensor_lr_that_changes_in_place(backend, rule):
    def each(optimizer):
        return lambda step: optimizer.param_groups[0]["lr"].mul_(0.95)

    assert_same_run(
        lambda m: torch_class(rule)(m.parameters(), lr=LR.clone()),
        lambda m: ours_class(rule)(m.parameters(), lr=LR.clone(), weighting=RAW),
        each=each,
    )


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_closure(backend, rule):
    model, other = Student(), Student()
    ours = ours_class(rule)(model.parameters(), lr=1e-2, weighting=RAW)
    theirs = torch_class(rule)(other.parameters(), lr=1e-2)
    for step in range(5):

        def our_closure(step=step):
            ours.zero_grad()
            loss = loss_of(model, step, torch.float64)
            ours.backward(loss)
            return loss

        def their_closure(step=step):
            theirs.zero_grad()
            loss = loss_of(other, step, torch.float64)
            loss.backward()
            return loss

        a, b = ours.step(our_closure), theirs.step(their_closure)
        assert a.requires_grad
        assert abs(a.item() - b.item()) <= tolerances.REORDERED * b.item()
    assert ours.step() is None  # no closure: the gradients are still there


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_parameters_without_gradient(backend, rule):
    """As in torch: not decayed, not moved, no state."""
    options = {"weight_decay": 0.5} | ({"momentum": 0.9} if rule == "sgd" else {})
    model = Student()
    optimizer = ours_class(rule)(model.parameters(), lr=0.1, weighting=RAW, **options)
    before = model.projector.weight.detach().clone()
    take_step(optimizer, model, 0, torch.float64)
    assert torch.equal(model.projector.weight, before)
    assert not optimizer.state[model.projector.weight]
    assert not optimizer.state[model.unused]
    assert optimizer.state[model.trunk.weight]


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_step_hooks(backend, rule):
    model = Student()
    optimizer = ours_class(rule)(model.parameters(), lr=0.1, weighting=RAW)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o, model.scale.item())))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", o, model.scale.item())))
    start = model.scale.item()
    take_step(optimizer, model, 0, torch.float64)
    assert seen == [("pre", optimizer, start), ("post", optimizer, model.scale.item())]
    assert start != model.scale.item()


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_named_parameters(backend, rule):
    model = Student()
    optimizer = ours_class(rule)(model.named_parameters(), lr=0.1, weighting=RAW)
    take_step(optimizer, model, 0, torch.float64)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert not torch.equal(model.scale, Student().scale)


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_torchs_ways_to_run_are_accepted(backend, rule, how):
    steps = []
    for options in ({}, {how: True}):
        model = Student()
        optimizer = ours_class(rule)(model.parameters(), lr=0.1, weighting=RAW, **options)
        take_step(optimizer, model, 0, torch.float64)
        steps.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_empty_and_scalar_parameters(backend, rule):
    params = [nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(4, 0))]
    optimizer = ours_class(rule)(params, lr=0.1, weighting=RAW)
    optimizer.backward(sum(p.square().sum() for p in params))
    optimizer.step()
    # AdamW's first step is lr in the direction of the sign, after a decay of lr wd
    expected = 2 * (1 - 0.1 * 1e-2) - 0.1 if rule == "adamw" else 2 - 0.1 * 4
    assert abs(params[1].item() - expected) <= 8 * 2**-24 * 2
