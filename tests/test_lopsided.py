"""The warning that one objective has nearly all of the weight: once, and never in a healthy run."""

import warnings

import pytest
import torch
from dtokd import lopsided
from dtokd.cli import main
from dtokd.lopsided import LopsidedWeights
from dtokd.monitor import BalanceLogger

import dtokd_kernels as dk

from .digits import common, distilling

pytestmark = pytest.mark.usefixtures("one_thread")


def row(task, vertex=0.0, skipped=0.0):
    return {"step": 0, "share_task": task, "share_kl": 1 - task, "vertex": vertex, "skipped": skipped}


def told(*rows, times=1):
    texts = []
    watch = LopsidedWeights(texts.append)
    for _ in range(times):
        watch.write(rows, {})
    return texts


def test_it_tells_once_what_and_how_much():
    texts = told(row(0.0, vertex=1.0), row(0.06), times=lopsided.WINDOW * 3)
    assert len(texts) == 1
    assert "'kl' had 97 % of the gradient in the last 200 steps (vertex rate 50 %)" in texts[0]
    assert repr(lopsided.REMEDY) in texts[0]
    assert lopsided.REMEDY in dk.weighting.NAMES


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (0.1, 0.1), (0.94, 0.94)])
def test_a_healthy_run(weights):
    """Also one whose vertices take turns."""
    assert told(*map(row, weights), times=lopsided.WINDOW * 3) == []


@pytest.mark.parametrize(("longer", "warned"), [(5.0, False), (40.0, True)])
def test_a_long_gradient_with_a_small_weight_trains(longer, warned):
    """Of a gradient that is 5 times as long the weight is 4 %, but its share of the update 17 %."""
    texts = []
    balance = dk.balance(torch.diag(torch.tensor([1.0, longer**2], dtype=torch.float64)), [1.0, 1.0])
    assert balance.weights[0] > 0.95
    assert not balance.vertex
    with BalanceLogger([LopsidedWeights(texts.append)]) as logger:
        for _ in range(lopsided.WINDOW):
            logger.log(balance, weight_decay=torch.tensor(0.0))
    assert bool(texts) == warned


def test_a_window_has_to_be_full():
    assert told(row(1.0), times=lopsided.WINDOW - 1) == []
    assert told(row(1.0), row(float("nan"), skipped=1.0), times=lopsided.WINDOW - 1) == []


def test_it_goes_on_where_it_was():
    """In the middle of a window, and after the warning."""
    texts = []
    first, second = LopsidedWeights(texts.append), LopsidedWeights(texts.append)
    first.write([row(1.0)] * (lopsided.WINDOW - 1), {})
    second.load_state_dict(first.state_dict())
    second.write([row(1.0)], {})
    assert len(texts) == 1
    third = LopsidedWeights(texts.append)
    third.load_state_dict(second.state_dict())
    third.write([row(1.0)] * lopsided.WINDOW * 2, {})
    assert len(texts) == 1


def train(weighting, offset, steps=2 * lopsided.WINDOW + 10):
    """Two losses that agree; one of them cannot fall below `offset`, so that its log-gradient stays the shorter one."""
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = dk.DTOSGD([w], lr=1e-4, weighting=weighting)
    with BalanceLogger([], every=50, optimizer=optimizer):
        for _ in range(steps):
            optimizer.backward({"task": w.square().sum(), "kl": (w - 0.1).square().sum() + offset})
            optimizer.step()
            optimizer.zero_grad()


def test_in_a_loop_of_ones_own():
    with pytest.warns(UserWarning, match="'kl' had 100 % of the gradient") as found:
        train(dk.weighting.DTO(), 100.0)
    assert len(found) == 1


@pytest.mark.parametrize("weighting", [dk.weighting.DTO(), dk.weighting.Fixed([0.99, 0.01])])
def test_no_warning(weighting):
    """Losses that are alike, and weights that the user chose."""
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = dk.DTOSGD([w], lr=1e-4, weighting=weighting)
    with warnings.catch_warnings(), BalanceLogger([], every=50, optimizer=optimizer):
        warnings.simplefilter("error")
        for _ in range(2 * lopsided.WINDOW):
            optimizer.backward({"task": (w[0] - 3).square(), "kl": (w[1] - 3).square()})
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("opt", ["dtoadamw", "adamw"])
def test_in_train_and_after_a_resume(digits, teacher, tmp_path, capsys, monkeypatch, opt):
    """The window is shortened; a second process does not warn again, and a balanced rule never does."""
    monkeypatch.setattr(lopsided, "WINDOW", 4)
    monkeypatch.setattr(lopsided, "NEARLY_ALL", 0.5)
    argv = ["train", *common(digits, tmp_path), *distilling(teacher), "--opt", opt, "--resume", "auto"]
    argv += ["--kd-balance", "dto", "--experiment", "x", "--log-interval", "2"]

    def warned(*more):
        assert main([*argv, *more]) == 0
        return capsys.readouterr().out.replace("\n", " ").count("of the gradient in the last 4 steps")

    assert warned("--epochs", "1") == 1
    assert warned("--epochs", "3") == 0
    assert warned("--epochs", "3", "--experiment", "y") == 1
    assert warned("--epochs", "1", "--experiment", "z", "--kd-balance", "famo") == 0
