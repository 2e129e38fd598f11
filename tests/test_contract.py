"""The public contract: names, signatures and defaults that others call by name."""

import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn

import dtokd_kernels as dk

POSITIONAL, KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
REQUIRED = inspect.Parameter.empty

# name -> (positional parameters with defaults, keyword-only parameters with defaults); more keywords may come
COMMON = {"weighting": None, "max_norm": None, "private": "own", "loss_floor": 1e-8, "backend": None}
SIGNATURES = {
    "gram": ({"grads": REQUIRED}, {}),
    "min_norm_weights": ({"gram": REQUIRED, "clamp": True}, {}),
    "balance": (
        {"gram": REQUIRED, "losses": REQUIRED, "weighting": None},
        {"max_norm": None, "rescale": "none", "loss_floor": 1e-8},
    ),
    "combine": ({"grads": REQUIRED, "coefficients": REQUIRED, "out": None}, {}),
    "backward": (
        {"losses": REQUIRED, "params": REQUIRED, "weighting": None},
        {"max_norm": None, "rescale": "none", "private": "own", "loss_floor": 1e-8},
    ),
    "DTOAdamW": (
        {"params": REQUIRED, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "amsgrad": False},
        {"maximize": False, "capturable": False, "rescale": "none", **COMMON},
    ),
    "DTOSGD": (
        {"params": REQUIRED, "lr": 1e-3, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False},
        {"maximize": False, "rescale": "sum", **COMMON},
    ),
    "use_backend": ({"name": REQUIRED}, {}),
    "backend_info": ({}, {}),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    positional, keywords = SIGNATURES[name]
    parameters = inspect.signature(getattr(dk, name)).parameters
    found = {n: p.default for n, p in parameters.items() if p.kind is POSITIONAL}
    assert list(found.items()) == list(positional.items())  # the order too
    for keyword, default in keywords.items():
        assert parameters[keyword].kind is KEYWORD, keyword
        assert parameters[keyword].default == default, keyword


def test_public_names():
    assert set(SIGNATURES) | {"Balance", "weighting"} <= set(dk.__all__)
    assert all(hasattr(dk, name) for name in dk.__all__)
    assert isinstance(dk.__version__, str)


def test_fields_of_balance():
    balance = dk.balance(torch.eye(2), torch.ones(2))
    for name in ("weights", "coefficients", "gram", "cosine", "norms", "norm", "vertex", "skipped"):
        assert isinstance(getattr(balance, name), torch.Tensor), name
    assert isinstance(dk.Balance.conflict, property)
    assert isinstance(dk.Balance.dominance, property)


WEIGHTINGS = {
    "AlignedMTL": {"log_gradients": False, "preference": None},
    "Amortized": {"reading": "famo", "lr": 0.025, "weight_decay": 0.01},
    "CAGrad": {"c": 0.5, "log_gradients": False},
    "ConFIG": {"log_gradients": False, "preference": None},
    "DTO": {"log_gradients": True, "clamp": True},
    "DWA": {"period": 1000, "temperature": 2.0},
    "DualProj": {"log_gradients": False, "preference": None},
    "Fixed": {"weights": None, "log_gradients": False},
    "IMTLG": {"log_gradients": False},
    "LogSum": {},
    "NashMTL": {"log_gradients": False},
    "PCGrad": {"seed": 0, "log_gradients": False},
    "RLW": {"seed": 0, "log_gradients": False},
    "Share": {
        "shares": None,
        "beta": 0.99,
        "total": None,
        "primary": None,
        "freeze_after": None,
        "log_gradients": False,
    },
    "TaskFirst": {
        "primary": 0,
        "rule": "cosine",
        "ratio": 1.0,
        "tau": 0.02,
        "beta": 0.999,
        "patience": None,
        "log_gradients": False,
    },
    "Reachable": {"loss_min": None, "preference": None},
    "UPGrad": {"log_gradients": False, "preference": None},
    "HeldOut": {"primary": 0, "beta": 0.95},
    "Auto": {"primary": 0, "window": 40},
    "WhileBetter": {"primary": 0, "beta": 0.8},
    "UncertaintyWeighting": {"lr": 1e-3, "weight_decay": 0.0},
}


def test_signatures_of_weightings():
    classes = set(dk.weighting.__all__) - {"NAMES", "Stateful", "from_name"}
    assert {
        name: {n: p.default for n, p in inspect.signature(getattr(dk.weighting, name)).parameters.items()}
        for name in classes
    } == WEIGHTINGS


def test_weightings():
    assert callable(dk.weighting.DTO())
    assert hash(dk.weighting.DTO()) == hash(dk.weighting.DTO())  # values, not identities
    assert dk.weighting.DTO() == dk.weighting.DTO()


@pytest.mark.parametrize("name", ["DTOAdamW", "DTOSGD"])
def test_methods_of_optimizers(name):
    optimizer = getattr(dk, name)([nn.Parameter(torch.ones(3))])
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.balance is None
    assert next(iter(inspect.signature(optimizer.backward).parameters)) == "losses"
    assert inspect.signature(optimizer.step).parameters["closure"].default is None
    assert inspect.signature(optimizer.zero_grad).parameters["set_to_none"].default is True
    with pytest.raises(AttributeError):
        optimizer.balance = None  # a record of what happened, not a setting


def test_worked_example():
    """The way of the data, arrow by arrow, with the numbers that every page of the project uses."""
    grads = [[torch.tensor([-4.0, 1.0]), torch.tensor([1.0])], [torch.tensor([6.0, 1.0]), torch.tensor([1.0])]]
    gram = dk.gram(grads)
    assert gram.tolist() == [[18.0, -22.0], [-22.0, 38.0]]
    weights = dk.min_norm_weights(gram)
    assert (weights - torch.tensor([0.6, 0.4], dtype=torch.float64)).abs().max() <= 4 * 2**-53
    record = dk.balance(gram, torch.ones(2))
    assert torch.equal(record.weights, weights)
    direction = torch.cat(dk.combine(grads, record.coefficients))
    assert (direction - torch.tensor([0.0, 1.0, 1.0])).abs().max() <= 5 * 2.4 * 2**-24


def test_backend_info():
    info = dk.backend_info()
    assert {"cuda", "triton", "cpu", "reference", "chosen for cpu", "chosen for cuda", "torch"} <= info.keys()
    assert info["reference"] == "available"
    assert all(isinstance(value, str) for value in info.values())


def test_module_prints_backend_info():
    result = subprocess.run([sys.executable, "-m", "dtokd_kernels"], capture_output=True, text=True, check=True)
    for name, value in dk.backend_info().items():
        assert name in result.stdout
        assert value in result.stdout


def test_imports_torch_alone():
    """The library imports nothing of the toolkit and no optional package."""
    code = (
        "import sys, torch; before = set(sys.modules); import dtokd_kernels; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['dtokd_kernels']"
