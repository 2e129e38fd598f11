"""Losses that are not finite: one is survived, a run of them ends `dtokd train` with one sentence."""

import csv

import pytest
import torch
from dtokd.cli import main
from dtokd.errors import Diverged
from dtokd.objectives.task import DistillationTask
from dtokd.train.divergence import PATIENCE, Divergence
from safetensors.torch import load_file

from .digits import common, distilling

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.usefixtures("one_thread"),
]
NAN, ONE = torch.tensor(torch.nan), torch.tensor(1.0)
BALANCED = "--opt dtoadamw --kd-balance dto"


def spoil(monkeypatch, steps, name="kl"):
    """The objective is NaN in these steps, as is the sum; the parameters are not to blame."""
    forward, count = DistillationTask.forward, [0]

    def spoilt(self, *args):
        result = forward(self, *args)
        if steps(count[0]):
            result["objectives"][name] = result["objectives"][name] * torch.nan
            result["loss"] = result["loss"] * torch.nan
        count[0] += 1
        return result

    monkeypatch.setattr(DistillationTask, "forward", spoilt)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "options",
    [
        BALANCED,
        "--opt dtosgd --kd-balance pcgrad",
        "--opt adamw --kd-balance dto",
        "--opt adamw --kd-balance famo",
        "--opt dtoadamw --kd-balance dwa --kd-balance-gram overlap",
        "--opt dtoadamw --kd-balance dto --kd-balance-gram lag",
        "--opt dtoadamw --kd-balance logsum",
    ],
)
def test_one_step_is_survived(monkeypatch, digits, teacher, tmp_path, options):
    """It is skipped and counted, and the next ones train: on a CPU as on a GPU."""
    spoil(monkeypatch, lambda count: count == 1)
    argv = ["train", *common(digits, tmp_path), "--experiment", "x", *distilling(teacher), *options.split()]
    assert main(argv) == 0
    steps = rows(tmp_path / "x" / "steps.csv")
    assert [float(row["skipped"]) for row in steps] == [0, 1, 0, 0, 0, 0, 0, 0]
    assert all(t.isfinite().all() for t in load_file(tmp_path / "x" / "student-last.safetensors").values())


@pytest.mark.parametrize("options", [BALANCED, "--opt adamw --kd-balance dto", "--opt adamw --kd-balance none"])
def test_diverged_run(monkeypatch, capsys, digits, teacher, tmp_path, options):
    """From the second epoch on: the first is on disk, whole, with its report."""
    spoil(monkeypatch, lambda count: count >= 4)
    argv = ["train", *common(digits, tmp_path), "--experiment", "x", *distilling(teacher), *options.split()]
    assert main([*argv, "--epochs", "5"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dtokd train: error: the run has diverged: in epoch 2, up to iteration 4, kl")
    assert "not finite for 4 iterations in a row; start anew with a --lr below" in error
    assert error.count("\n") == 1
    path = tmp_path / "x"
    assert [row["epoch"] for row in rows(path / "summary.csv")] == ["0"]
    assert [file.name for file in sorted((path / "checkpoints").iterdir())][-1] == "epoch-0001.safetensors"
    assert (path / "report.html").exists()
    assert all(t.isfinite().all() for t in load_file(path / "student.safetensors").values())


def test_a_learning_rate_that_is_far_too_large(capsys, digits, teacher, tmp_path):
    """As it really happens: also without a balance, where timm trains NaN to the end."""
    argv = ["train", *common(digits, tmp_path), *distilling(teacher), "--opt", "adamw", "--epochs", "3", "--lr", "1e12"]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "the run has diverged" in error
    assert "--lr below 1e+12" in error


def test_sweep_goes_on(capsys, digits, teacher, tmp_path):
    """One of its runs diverges: the others are trained, and it is named."""
    argv = ["sweep", *common(digits, tmp_path), *distilling(teacher), "--opt", "adamw", "--experiment", "s"]
    assert main([*argv, "--seeds", "0", "--balances", "fixed:0.5,lr=1e12", "fixed:0.5"]) == 1
    assert "--balances: fixed:0.5,lr=1e12 with seed 0 diverged" in capsys.readouterr().err
    assert (tmp_path / "s" / "fixed_0.5" / "seed-0" / "finished").exists()
    assert main([*argv, "--seeds", "0", "--balances", "fixed:0.5"]) == 0


def test_negative_loss_is_one_line(monkeypatch, capsys, digits, teacher, tmp_path):
    forward = DistillationTask.forward

    def negative(self, *args):
        result = forward(self, *args)
        result["objectives"]["kl"] = result["objectives"]["kl"] - 1e3
        return result

    monkeypatch.setattr(DistillationTask, "forward", negative)
    argv = ["train", *common(digits, tmp_path), *distilling(teacher), *BALANCED.split()]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("dtokd train: error: --kd-balance dto: ")
    assert "log-gradients need a positive loss" in error


def counted(divergence, *bad, skipped=None):
    for value in bad:
        divergence.add({"loss": value, "task": ONE, "kl": value}, skipped)
    return divergence.counts.tolist()


def test_rule():
    """In a row, over epochs, of any one loss; at least two, and at most `PATIENCE`."""
    assert [Divergence(n).patience for n in (1, 2, 10, 10**6)] == [2, 2, 10, PATIENCE]
    divergence = Divergence(3)
    assert counted(divergence, NAN, NAN, ONE, NAN) == [1, 0, 1]
    assert counted(divergence, NAN) == [2, 0, 2]
    divergence.check(divergence.counts.tolist(), 0, 5, "stop")
    assert counted(divergence, torch.tensor(torch.inf)) == [3, 0, 3]
    with pytest.raises(Diverged, match=r"in epoch 2, up to iteration 6, kl was not finite for 3 iterations in a row"):
        divergence.check(divergence.counts.tolist(), 1, 6, "stop")


def test_skipped_steps_count():
    """A gradient may be bad where no loss is; then nothing is trained either."""
    divergence = Divergence(2)
    counted(divergence, ONE, ONE, skipped=torch.tensor(True))
    with pytest.raises(Diverged, match="a gradient was not finite"):
        divergence.check(divergence.counts.tolist(), 0, 2, "stop")
