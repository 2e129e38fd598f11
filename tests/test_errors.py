"""Every bad input gets an error that names the argument and the remedy, and changes nothing."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import dtokd_kernels as dk
from dtokd_kernels import backends

from .device import DEVICE
from .inputs import gradients
from .oracle import Student, batch, losses_of
from .sources import copies, state_of

OPTIMIZERS = {
    "DTOAdamW": lambda p, **o: dk.DTOAdamW(p, amsgrad=True, **o),
    "DTOSGD": lambda p, **o: dk.DTOSGD(p, momentum=0.9, **o),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


class Untouched:
    """Model, optimizer, state and `.grad` in the middle of a run; `check` asserts that nothing of them changed."""

    def __init__(self, name):
        self.model = Student()
        self.optimizer = OPTIMIZERS[name](self.model.parameters())
        self.optimizer.backward(losses_of(self.model, batch()))
        self.optimizer.step()
        self.optimizer.zero_grad()
        for p in self.model.parameters():
            p.grad = torch.full_like(p, 5.0)
        self.grads = [p.grad for p in self.model.parameters()]
        self.params = copies(self.model.parameters())
        self.state = state_of(self.optimizer)
        self.record = self.optimizer.balance

    def check(self):
        assert all(torch.equal(p, q) for p, q in zip(self.model.parameters(), self.params, strict=True))
        state = state_of(self.optimizer)
        assert state.keys() == self.state.keys()
        assert all(torch.equal(state[key], self.state[key]) for key in state)
        assert all(p.grad is grad for p, grad in zip(self.model.parameters(), self.grads, strict=True))
        assert all((grad == 5.0).all() for grad in self.grads)
        assert self.optimizer.balance is self.record
        assert self.optimizer.skipped_steps == 0


# ---- gradient lists --------------------------------------------------------------------------------


def with_changed(change):
    grads = gradients(3, [5, (4, 4)], torch.float32)
    grads[1][1] = change(grads[1][1])
    return grads


BAD_LISTS = {
    "shape": (
        lambda: with_changed(lambda g: g[:, :3]),
        r"grads\[1\]\[1\] has shape \(4, 3\), expected \(4, 4\) as grads\[0\]\[1\]; pass gradients of the same param",
    ),
    "as many elements": (
        lambda: with_changed(lambda g: g.view(2, 8)),
        r"grads\[1\]\[1\] has shape \(2, 8\), expected \(4, 4\) as grads\[0\]\[1\]",
    ),
    "dtype": (
        lambda: with_changed(torch.Tensor.double),
        r"grads\[1\]\[1\] has dtype torch.float64, expected torch.float32 as grads\[0\]\[1\]",
    ),
    "device": (
        lambda: with_changed(lambda g: g.to("meta")),
        r"grads\[1\]\[1\] has device meta, expected \w+(:\d+)? as grads\[0\]\[1\]",
    ),
    "sparse": (lambda: with_changed(torch.Tensor.to_sparse), r"grads\[1\]\[1\] is sparse.*\.to_dense\(\)"),
    "integers": (
        lambda: with_changed(torch.Tensor.long),
        r"grads\[1\]\[1\] is torch.int64; pass a floating-point tensor",
    ),
    "complex": (lambda: with_changed(lambda g: g + 1j), r"grads\[1\]\[1\] is torch.complex64.*view_as_real"),
    "no tensor": (lambda: with_changed(lambda g: 1.0), r"grads\[1\]\[1\] is a float; pass a tensor or None"),
    "lengths": (
        lambda: [row[: 2 - i] for i, row in enumerate(gradients(2, [3, 3], torch.float32))],
        r"grads\[1\] has 1 tensors, expected 2 as grads\[0\]",
    ),
    "nine objectives": (lambda: gradients(9, [3], torch.float32), r"grads has 9 lists; at most 8 objectives"),
    "empty": (lambda: [], r"grads is empty or a tensor; pass K lists of tensors"),
    "a tensor": (lambda: torch.ones(2, 3), r"grads is empty or a tensor; pass K lists of tensors"),
}


@pytest.mark.parametrize("op", ["gram", "combine"])
@pytest.mark.parametrize("case", BAD_LISTS)
def test_gradient_lists(backend, case, op):
    grads, message = BAD_LISTS[case]
    with pytest.raises((ValueError, TypeError), match=f"^{op}: {message}"):
        dk.gram(grads()) if op == "gram" else dk.combine(grads(), [1.0] * 3)


def test_gram_of_nothing(backend):
    with pytest.raises(ValueError, match=r"^gram: grads holds no tensor; pass at least one gradient"):
        dk.gram([[None, None], [None, None]])


BAD_OUT = {
    "length": ([torch.zeros(5)], r"combine: out has 1 tensors, expected 2 as grads\[0\]"),
    "shape": ([torch.zeros(5), torch.zeros(4, 3)], r"combine: out\[1\] is \(4, 3\) .*, expected \(4, 4\)"),
    "dtype": (
        [torch.zeros(5), torch.zeros(4, 4).double()],
        r"combine: out\[1\] is .* torch.float64 .*expected .*float32",
    ),
    "device": (
        [torch.zeros(5), torch.zeros(4, 4).to("meta")],
        r"combine: out\[1\] is .* on meta, expected .* on \w+(:\d+)?",
    ),
}


@pytest.mark.parametrize("case", BAD_OUT)
def test_out(backend, case):
    out, message = BAD_OUT[case]
    with pytest.raises(ValueError, match=message):
        dk.combine(gradients(2, [5, (4, 4)], torch.float32), [0.5, 0.5], out=out)
    assert all((t == 0).all() for t in out if t.device.type == "cpu")


@pytest.mark.parametrize("coefficients", [[1.0], [1.0, 2.0, 3.0], 1.0, [[1.0, 2.0]]])
def test_coefficients(backend, coefficients):
    out = [torch.zeros(5), torch.zeros(4, 4, dtype=torch.float64)]
    rows = [
        gradients(1, [5], torch.float32, seed)[0] + gradients(1, [(4, 4)], torch.float64, seed)[0] for seed in (1, 2)
    ]
    with pytest.raises(ValueError, match=r"combine: coefficients has shape .*, expected \(2,\)"):
        dk.combine(rows, coefficients, out=out)
    assert all((t == 0).all() for t in out)


# ---- K x K -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["min_norm_weights", "balance"])
@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.ones(2, 3), r"gram has shape \(2, 3\), expected \(K, K\) with K from 1 to 8"),
        (torch.ones(9, 9), r"gram has shape \(9, 9\), expected \(K, K\) with K from 1 to 8"),
        (torch.ones(0, 0), r"gram has shape \(0, 0\), expected \(K, K\)"),
        (torch.ones(2), r"gram has shape \(2,\), expected \(K, K\)"),
        (torch.tensor(1.0), r"gram has shape \(\), expected \(K, K\)"),
        (torch.ones(2, 2, 2), r"gram has shape \(2, 2, 2\), expected \(K, K\)"),
        (torch.ones(2, 2).long(), r"gram is torch.int64; pass a floating-point tensor"),
        ([[1.0, 0.0], [0.0, 1.0]], r"gram is a list; pass a \[K, K\] tensor"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(getattr(value, "shape", "list")),
)
def test_gram_argument(backend, op, gram, message):
    with pytest.raises((ValueError, TypeError), match=f"^{op}: {message}"):
        dk.min_norm_weights(gram) if op == "min_norm_weights" else dk.balance(gram, torch.ones(2))


@pytest.mark.parametrize("losses", [[1.0], [1.0, 2.0, 3.0], 1.0, torch.ones(2, 1)], ids=str)
def test_number_of_losses(backend, losses):
    with pytest.raises(ValueError, match=r"^balance: losses has shape .*, expected \(2,\) as gram is 2 x 2"):
        dk.balance(torch.eye(2), losses)


# ---- options: the same words from balance, backward and the optimizers -----------------------------

BAD_OPTIONS = {
    "max_norm 0": ({"max_norm": 0.0}, r"max_norm is 0.0; pass a positive number, or None for no clipping"),
    "max_norm -1": ({"max_norm": -1}, r"max_norm is -1; pass a positive number, or None"),
    "max_norm nan": ({"max_norm": float("nan")}, r"max_norm is nan; pass a positive number, or None"),
    "rescale": ({"rescale": "mean"}, r"rescale is 'mean'; choose 'none' \(the paper\) or 'sum'"),
    "loss_floor 0": ({"loss_floor": 0.0}, r"loss_floor is 0.0; pass a positive number, such as 1e-8"),
    "loss_floor nan": ({"loss_floor": float("nan")}, r"loss_floor is nan; pass a positive number"),
    "weighting": ({"weighting": [0.5, 0.5]}, r"weighting is \[0.5, 0.5\]; pass a callable such as .*DTO\(\)"),
    "weighting class": ({"weighting": dk.weighting.DTO}, r"weighting is <class .*DTO'>; pass a callable such as"),
    "max_norm text": ({"max_norm": "1"}, r"max_norm is '1'; pass a positive number, or None"),
    "private": ({"private": "mine"}, r"private is 'mine'; choose 'own' or 'balanced'"),
}


@pytest.mark.parametrize(
    ("op", "case"),
    [
        (op, case)
        for op in ("balance", "backward", "DTOAdamW", "DTOSGD")
        for case in BAD_OPTIONS
        if (op, case) != ("balance", "private")  # it sees no parameters, so none that are private
    ],
)
def test_options(backend, op, case):
    options, message = BAD_OPTIONS[case]
    w = nn.Parameter(torch.ones(2))
    call = {
        "balance": lambda: dk.balance(torch.eye(2), torch.ones(2), **options),
        "backward": lambda: dk.backward([w.square().sum()], [w], **options),
    }.get(op, lambda: getattr(dk, op)([w], **options))
    with pytest.raises((ValueError, TypeError), match=f"^{op}: {message}"):
        call()
    assert w.grad is None


@each_optimizer
def test_number_of_fixed_weights(backend, name):
    """Only the losses tell K, so it is backward that refuses; nothing has changed then."""
    with pytest.raises(ValueError, match=r"Fixed: weights has 3 numbers for 2 objectives; give one each"):
        dk.balance(torch.eye(2), torch.ones(2), dk.weighting.Fixed([1.0, 2.0, 3.0]))
    model = Student()
    optimizer = OPTIMIZERS[name](model.parameters(), weighting=dk.weighting.Fixed([1.0]))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"Fixed: weights has 1 numbers for 2 objectives; give one each"):
        optimizer.backward(losses_of(model, batch()))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not optimizer.state_dict()["state"]
    with pytest.raises(ValueError, match=r"Fixed: weights has 1 numbers"):
        dk.backward(losses_of(model, batch()), model.parameters(), dk.weighting.Fixed([1.0]))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "weights", [torch.ones(3), torch.ones(1), torch.tensor(0.5), torch.ones(2, 1)], ids=lambda w: str(tuple(w.shape))
)
def test_what_a_weighting_returns(backend, weights):
    """Anything but a tensor [K] is refused, not broadcast."""
    with pytest.raises(ValueError, match=r"weighting .*shape .*expected \(2,\)"):
        dk.balance(torch.eye(2), torch.ones(2), lambda gram: weights)


# ---- parameters ------------------------------------------------------------------------------------


def not_a_leaf():
    return nn.Parameter(torch.ones(2)) * 2


@each_optimizer
@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "empty parameter list"),
        ([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2) + 1j)], ValueError, r"params\[1\] is complex"),
        ([{"params": [nn.Parameter(torch.ones(2) + 1j)]}], ValueError, r"params\[0\] is complex.*view_as_real"),
        ([not_a_leaf()], ValueError, "can't optimize a non-leaf Tensor"),
        ([1.0], TypeError, "optimizer can only optimize Tensors"),
    ],
    ids=["empty", "complex", "complex in a group", "no leaf", "no tensor"],
)  # fmt: skip
def test_parameters_of_optimizers(name, params, error, message):
    with pytest.raises(error, match=message):
        OPTIMIZERS[name](params)


@each_optimizer
def test_refused_group_is_not_added(backend, name):
    case = Untouched(name)
    with pytest.raises(ValueError, match=rf"^{name}: params\[0\] is complex"):
        case.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2) + 1j)]})
    assert len(case.optimizer.param_groups) == 1
    case.check()
    case.optimizer.backward(losses_of(case.model, batch()))
    case.optimizer.step()


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, r"backward: params is empty; pass the parameters to balance"),
        (nn.Parameter(torch.ones(2)), TypeError, r"backward: params is a tensor; pass a list of tensors"),
        ([nn.Parameter(torch.ones(2) + 1j)], ValueError, r"backward: params\[0\] is complex"),
        ([not_a_leaf()], ValueError, r"backward: params\[0\] is not a leaf; pass the parameter, not"),
        ([1.0], TypeError, r"backward: params\[0\] is a float; pass tensors"),
    ],
    ids=["empty", "tensor", "complex", "no leaf", "no tensor"],
)
def test_parameters_of_backward(backend, params, error, message):
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=message):
        dk.backward([w.square().sum()], params)
    assert w.grad is None


def test_parameter_given_twice_to_backward(backend):
    """Its gradient would count twice in the Gram matrix and be added twice; torch's optimizers refuse it too."""
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"backward: params\[1\] is"):
        dk.backward([w.square().sum(), (w - 3).square().sum()], [w, w])
    assert w.grad is None


@pytest.mark.parametrize("op", ["backward", "DTOAdamW", "DTOSGD"])
def test_sparse_gradients(backend, op):
    embedding = nn.Embedding(5, 3, sparse=True)
    dense = nn.Linear(3, 1)
    params = [*dense.parameters(), *embedding.parameters()]
    before = [p.detach().clone() for p in params]
    index = torch.tensor([1, 3])
    losses = {"a": dense(embedding(index)).square().mean(), "b": (dense(embedding(index)) - 1).square().mean()}
    message = r"the gradient of objective 'a' for parameter 2 \(5, 3\) is sparse.*build the embedding with sparse=False"
    if op == "backward":
        with pytest.raises(ValueError, match=f"^backward: {message}"):
            dk.backward(losses, params)
    else:
        optimizer = OPTIMIZERS[op](params)
        with pytest.raises(ValueError, match=rf"^{op}\.backward: {message}"):
            optimizer.backward(losses)
        with pytest.raises(RuntimeError, match="there are no gradients"):
            optimizer.step()
        assert not optimizer.state_dict()["state"]
    assert all(p.grad is None for p in params)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


# ---- losses ----------------------------------------------------------------------------------------


def constant(value):
    return lambda losses: losses["task"] * 0 + value


BAD_LOSSES = {
    "vector": (
        lambda losses: torch.stack([losses["task"]] * 2),
        ValueError,
        r"has shape \(2,\), expected a scalar; reduce it",
    ),
    "number": (lambda losses: 3.0, TypeError, r"is a float; pass the loss tensor itself, before .item\(\)"),
    "None": (lambda losses: None, TypeError, r"is a NoneType; pass the loss tensor itself"),
    "no gradient": (
        lambda losses: losses["task"].detach(),
        ValueError,
        r"needs no gradient; compute it from the parameters",
    ),
    "negative": (constant(-1.0), ValueError, r"is -1.0, but log-gradients need a positive loss; shift the loss"),
    "zero": (constant(0.0), ValueError, r"is 0.0, but log-gradients need a positive loss; .*loss.clamp"),
    "complex": (lambda losses: losses["task"] + 1j, ValueError, r"is complex; take its real part"),
}
if DEVICE.type != "cpu":  # values there are not read; the step is skipped
    BAD_LOSSES = {name: case for name, case in BAD_LOSSES.items() if name not in ("negative", "zero")}


@pytest.mark.parametrize("case", BAD_LOSSES)
@each_optimizer
def test_losses_of_optimizers(backend, name, case):
    change, error, message = BAD_LOSSES[case]
    situation = Untouched(name)
    losses = losses_of(situation.model, batch())
    losses["distill"] = change(losses)
    with pytest.raises(error, match=rf"^{name}\.backward: losses\['distill'\] {message}"):
        situation.optimizer.backward(losses)
    situation.check()
    with pytest.raises(RuntimeError, match="there are no gradients"):
        situation.optimizer.step()
    situation.check()
    losses_of(situation.model, batch())["task"].backward()  # and no hook or graph of it is in the way


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_losses_of_backward(backend, case):
    change, error, message = BAD_LOSSES[case]
    model = Student()
    losses = losses_of(model, batch())
    losses["distill"] = change(losses)
    with pytest.raises(error, match=rf"^backward: losses\['distill'\] {message}"):
        dk.backward(losses, model.parameters())
    assert all(p.grad is None for p in model.parameters())


@each_optimizer
def test_bad_loss_leaves_what_is_gathered(backend, name):
    """The check comes before the first pass: an accumulation goes on as if the call had not been."""
    models, optimizers = [], []
    for disturbed in (True, False):
        model = Student()
        optimizer = OPTIMIZERS[name](model.parameters())
        optimizer.backward(losses_of(model, batch(0)))
        if disturbed:
            losses = losses_of(model, batch(1))
            with pytest.raises(ValueError, match="needs no gradient"):
                optimizer.backward({**losses, "distill": losses["distill"].detach()})
        optimizer.backward(losses_of(model, batch(2)))
        optimizer.step()
        models.append(model)
        optimizers.append(optimizer)
    assert torch.equal(optimizers[0].balance.gram, optimizers[1].balance.gram)
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


@each_optimizer
def test_failure_in_the_middle_of_a_pass_leaves_nothing_half_done(backend, name):
    """The second objective's backward pass raises: `.grad`, parameters and state are as before, the sets are empty."""
    situation = Untouched(name)
    losses = losses_of(situation.model, batch())
    losses["distill"].register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        situation.optimizer.backward(losses)
    situation.check()
    with pytest.raises(RuntimeError, match="there are no gradients"):
        situation.optimizer.step()
    situation.check()


@pytest.mark.parametrize("case", ["zero", "negative"])
@each_optimizer
def test_loss_may_be_anything_finite_without_log_gradients(backend, name, case):
    model = Student()
    optimizer = OPTIMIZERS[name](model.parameters(), weighting=dk.weighting.DTO(log_gradients=False))
    losses = losses_of(model, batch())
    losses["distill"] = losses["distill"] - (losses["distill"].item() if case == "zero" else 1e3)
    optimizer.backward(losses)
    optimizer.step()
    assert not optimizer.balance.skipped


NONSENSE = {
    "text": "no",
    "tensor": torch.tensor([1, 2]),
    "nan": float("nan"),
    "list": [None],
    "object": object(),
    "negative": -1,
}
#: Every argument of our own: how it is given, and which of the values above have a meaning there.
ARGUMENTS = {
    **{
        f"{op}: {name}": (lambda value, op=op, name=name: optimizer_with(op, **{name: value}), ())
        for op in ("DTOAdamW", "DTOSGD")
        for name in ("weighting", "max_norm", "rescale", "private", "loss_floor", "gram", "backend", "state_dtype",
                     "master_weights")
    },
    **{
        f"{op}: balance": (
            lambda value, op=op: getattr(dk, op)([{"params": [nn.Parameter(torch.ones(2))], "balance": value}]), ()
        )
        for op in ("DTOAdamW", "DTOSGD")
    },
    **{
        f"DTOAdamW: weighting.{name}": (
            lambda value, name=name: optimizer_with("DTOAdamW", weighting=dk.weighting.DTO(**{name: value})), ()
        )
        for name in ("log_gradients", "clamp")
    },
    **{
        f"backward: {name}": (lambda value, name=name: backward_with(**{name: value}), ())
        for name in ("weighting", "max_norm", "rescale", "private", "loss_floor", "gram", "share", "params")
    },
    **{
        f"balance: {name}": (lambda value, name=name: dk.balance(torch.eye(2), torch.ones(2), **{name: value}), ())
        for name in ("weighting", "max_norm", "rescale", "loss_floor")
    },
    "Every: n": (dk.sources.Every, ()),
    "Every: source": (lambda value: dk.sources.Every(2, value), ()),
    "Ema: beta": (dk.sources.Ema, ()),
    "Ema: source": (lambda value: dk.sources.Ema(0.5, value), ()),
    "Probe: of": (dk.sources.Probe, ("tensor",)),
    "Feature: of": (dk.sources.Feature, ()),
    "Fixed: weights": (dk.weighting.Fixed, ("tensor",)),
    "RLW: seed": (dk.weighting.RLW, ("negative",)),
    "PCGrad: seed": (dk.weighting.PCGrad, ("negative",)),
    "CAGrad: c": (dk.weighting.CAGrad, ()),
    "DWA: period": (dk.weighting.DWA, ()),
    "DWA: temperature": (lambda value: dk.weighting.DWA(temperature=value), ()),
    "Amortized: reading": (dk.weighting.Amortized, ()),
    "Amortized: lr": (lambda value: dk.weighting.Amortized(lr=value), ()),
    "Amortized: weight_decay": (lambda value: dk.weighting.Amortized(weight_decay=value), ()),
    "UncertaintyWeighting: lr": (lambda value: dk.weighting.UncertaintyWeighting(lr=value), ()),
    "UncertaintyWeighting: weight_decay": (lambda value: dk.weighting.UncertaintyWeighting(weight_decay=value), ()),
    "from_name: ": (dk.weighting.from_name, ()),
}  # fmt: skip


@pytest.mark.parametrize("features", [3, "no", object()])
@pytest.mark.parametrize("gram", ["feature", "exact"])
def test_features_that_are_none(gram, features):
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"^backward: features is .*; pass the tensor, or a list of tensors"):
        dk.backward([w.square().sum()], [w], gram=gram, features=features)
    with pytest.raises(TypeError, match=r"^DTOSGD\.backward: features is .*; pass the tensor, or a list of tensors"):
        dk.DTOSGD([w], gram=gram).backward([w.square().sum()], features=features)


def optimizer_with(op, **options):
    return getattr(dk, op)([nn.Parameter(torch.ones(2))], **options)


def backward_with(**options):
    w = nn.Parameter(torch.ones(2))
    try:
        return dk.backward([w.square().sum()], **{"params": [w], **options})
    finally:
        assert w.grad is None


@pytest.mark.parametrize("value", NONSENSE)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_no_argument_takes_nonsense(argument, value):
    """One sentence that names the argument and says what to pass, before anything is made."""
    make, meant = ARGUMENTS[argument]
    if value in meant:
        make(NONSENSE[value])
        return
    with pytest.raises((TypeError, ValueError), match=f"^{argument}.*; (pass|choose) ") as caught:
        make(NONSENSE[value])
    assert "\n" not in str(caught.value).replace(repr(NONSENSE[value]), "")


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ([], ValueError, "losses is empty; pass at least one scalar tensor"),
        ({}, ValueError, "losses is empty; pass at least one scalar tensor"),
        (None, TypeError, "losses is a NoneType; pass a list of scalar tensors, or a dict"),
        ("task", TypeError, "losses is a str; pass a list of scalar tensors, or a dict"),
        (3.0, TypeError, "losses is a float; pass a list of scalar tensors, or a dict"),
    ],
    ids=["list", "dict", "None", "str", "float"],
)
def test_kinds_of_losses(backend, losses, error, message):
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=f"^backward: {message}"):
        dk.backward(losses, [w])
    with pytest.raises(error, match=rf"^DTOAdamW\.backward: {message}"):
        dk.DTOAdamW([w]).backward(losses)


@each_optimizer
def test_too_many_objectives(backend, name):
    """Nine losses: refused before the first of nine backward passes, not after the last."""
    situation = Untouched(name)
    task = losses_of(situation.model, batch())["task"]
    with pytest.raises(ValueError, match=rf"{name}.*9.*8"):
        situation.optimizer.backward([task * i for i in range(1, 10)])
    situation.check()
    with pytest.raises(ValueError, match=r"backward.*9.*8"):
        dk.backward([task * i for i in range(1, 10)], situation.model.parameters())
    situation.check()


@each_optimizer
def test_step_without_backward(backend, name):
    situation = Untouched(name)
    with pytest.raises(
        RuntimeError, match=rf"^{name}\.step: there are no gradients; call backward\(losses\) of this optimizer"
    ):
        situation.optimizer.step()
    situation.check()
    losses_of(situation.model, batch())["task"].backward()  # the wrong backward, for which the message has a word
    with pytest.raises(RuntimeError, match=r"not loss\.backward\(\)"):
        situation.optimizer.step()


@pytest.mark.parametrize("names", [("distill", "task"), ("task", "other"), ("task",), ("task", "distill", "more")])
@each_optimizer
def test_objectives_that_change_between_accumulating_calls(backend, name, names):
    situation = Untouched(name)
    situation.optimizer.backward(losses_of(situation.model, batch()))
    losses = losses_of(situation.model, batch())
    changed = {key: losses.get(key, losses["task"]) for key in names}
    message = rf"^{name}\.backward: losses are \[{', '.join(names)}\], but .* belong to \[task, distill\]; call step"
    with pytest.raises(ValueError, match=message):
        situation.optimizer.backward(changed)
    situation.check()
    situation.optimizer.zero_grad()
    situation.optimizer.backward(changed)  # after zero_grad they may
    assert situation.optimizer.objectives == names


def test_second_backward_through_a_freed_graph(backend):
    model = Student()
    optimizer = dk.DTOAdamW(model.parameters())
    losses = losses_of(model, batch())
    optimizer.backward(losses)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        optimizer.backward(losses)


# ---- backends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backend_that_cannot_run_here(name):
    reason = backends.missing(name)
    if reason is None:
        pytest.skip(f"backend {name!r} can run here")
    message = rf"backend '{name}' is not available: .*Available: .*reference"
    with pytest.raises(RuntimeError, match=f"^use_backend: {message}"), dk.use_backend(name):
        pass
    with pytest.raises(RuntimeError, match=rf"^DTOSGD: backend: {message}"):
        dk.DTOSGD([nn.Parameter(torch.ones(2))], backend=name)
    with pytest.raises(RuntimeError, match=message):
        dk.gram([[torch.ones(2)]], backend=name)


def test_unknown_backend(monkeypatch):
    message = r"no backend is named 'gpu'; choose one of cuda, triton, cpu, reference"
    with pytest.raises(ValueError, match=f"^use_backend: {message}"), dk.use_backend("gpu"):
        pass
    for name in OPTIMIZERS:
        with pytest.raises(ValueError, match=rf"^{name}: backend: {message}"):
            OPTIMIZERS[name]([nn.Parameter(torch.ones(2))], backend="gpu")
    with pytest.raises(ValueError, match=message):
        dk.gram([[torch.ones(2)]], backend="gpu")
    with pytest.raises(ValueError, match=message):
        dk.combine([[torch.ones(2)]], [1.0], backend="gpu")
    monkeypatch.setenv("DTOKD_BACKEND", "gpu")
    with pytest.raises(ValueError, match=f"^DTOKD_BACKEND: {message}"):
        dk.gram([[torch.ones(2)]])


def test_use_backend_ends_with_its_block(backend):
    inside = backends.requested()
    with dk.use_backend("reference"):
        assert backends.requested() == "reference"
        with dk.use_backend(backend):
            assert backends.requested() == backend
        assert backends.requested() == "reference"
    assert backends.requested() == inside
    with pytest.raises(ZeroDivisionError), dk.use_backend("reference"):
        _ = 1 / 0
    assert backends.requested() == inside


def test_who_decides_the_backend(monkeypatch):
    """use_backend over backend= over DTOKD_BACKEND over the best that is there."""
    cpu = torch.device("cpu")
    best = "cpu" if backends.missing("cpu") is None else "reference"

    def chosen(preferred=None):
        return backends.select(cpu, preferred).name

    assert chosen() == best
    assert chosen("reference") == "reference"
    monkeypatch.setenv("DTOKD_BACKEND", "reference")
    assert chosen() == "reference"
    assert dk.backend_info()["chosen for cpu"].startswith("reference (forced")
    assert chosen(best) == best
    with dk.use_backend("reference"):
        assert chosen(best) == "reference"


def test_environment_of_a_process():
    """DTOKD_BACKEND from outside, read by `python -m dtokd_kernels`."""
    result = subprocess.run(
        [sys.executable, "-m", "dtokd_kernels"],
        env={**os.environ, "DTOKD_BACKEND": "reference"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "reference (forced by use_backend or DTOKD_BACKEND)" in result.stdout
