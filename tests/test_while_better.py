"""`WhileBetter`: distillation weighs what part of the student's errors the teacher does not make."""

import copy
from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
from dtokd.cli import main
from dtokd.errors import UsageError
from dtokd.objectives.judged import judged
from dtokd.objectives.teacher import Normalisation, Teacher
from dtokd.train.heldout import Classifiers, HeldOutImages

import dtokd_kernels as dk
from dtokd_kernels.weighting import WhileBetter

from .digits import common, distilling
from .written import rows

pytestmark = pytest.mark.usefixtures("one_thread")
EYE = torch.eye(3, dtype=torch.float64)
ONES = torch.ones(3, dtype=torch.float64)
CLOSED = [1.0, 0.0, 0.0]


def split(gap):
    return pytest.approx([1 - gap, gap / 2, gap / 2])


def weights(rule, skipped=False):
    rule.expect(("task", "a", "b"))
    found = rule(EYE, ONES)
    rule.commit(torch.tensor(skipped))
    return found.tolist()


def rule_of(**options):
    return WhileBetter("task", **options)


@pytest.mark.parametrize(
    ("student", "teacher", "gap"),
    [
        (0.5, 0.125, 0.75),
        (0.5, 0.0, 1.0),
        (0.5, 0.5, 0.0),
        (0.1, 0.5, 0.0),
        (0.0, 0.0, 0.0),
        (2.0, 1.5, 0.25),
    ],
)
def test_the_gap(student, teacher, gap):
    rule = rule_of()
    assert weights(rule) == CLOSED  # nothing is known yet
    rule.observe(student=student, teacher=torch.tensor(teacher))
    assert weights(rule) == split(gap)


def test_averages_decide_and_a_teacher_that_is_overtaken_is_left():
    """By the formula, sums of 0.9^(n - i) 0.1 x_i, which decay alike, so that no bias is to be corrected."""
    rule, student, teacher, seen = rule_of(beta=0.9), 0.0, 0.0, []
    for error in (0.9, 0.6, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1):
        rule.observe(error, 0.3)
        student, teacher = 0.9 * student + 0.1 * error, 0.9 * teacher + 0.1 * 0.3
        seen.append(weights(rule))
        assert seen[-1] == split(max(0.0, 1 - teacher / student))
    assert seen[0] == split(2 / 3)
    assert seen[-1] == CLOSED


def test_constant_factors_of_the_losses_do_not_matter():
    """The direction is (1 - g) grad log L_task + g grad log L_distill."""
    directions = []
    for factor in (1.0, 50.0):
        w = torch.nn.Parameter(torch.tensor([0.5, -0.25], dtype=torch.float64))
        rule = WhileBetter("task")
        optimizer = dk.DTOSGD([w], lr=1.0, weighting=rule, rescale="none")
        rule.observe(0.8, 0.2)
        optimizer.backward({"task": (w - 1).square().sum(), "distill": factor * (w + 1).square().sum()})
        before = w.detach().clone()
        optimizer.step()
        directions.append(before - w.detach())
    before.requires_grad_()
    (0.25 * (before - 1).square().sum().log() + 0.75 * (before + 1).square().sum().log()).backward()
    for direction in directions:
        torch.testing.assert_close(direction, before.grad)


def test_what_is_not_finite_changes_nothing():
    rule = rule_of()
    rule.observe(0.5, 0.1)
    before = rule.state_dict()
    rule.observe(torch.tensor(float("nan")), 0.9)
    rule.observe(0.1, torch.tensor(float("inf")))
    rule.observe(0.1, float("nan"))
    rule.observe(torch.tensor(-0.1), 0.1)
    assert {name: float(before[name]) for name in ("student", "teacher")} == {
        name: float(rule.state_dict()[name]) for name in ("student", "teacher")
    }
    assert weights(rule) == split(0.8)


def test_state_goes_on():
    rule = rule_of()
    rule.observe(0.5, 0.1)
    weights(rule)
    fresh = rule_of()
    fresh.load_state_dict(copy.deepcopy(rule.state_dict()))
    for error in (0.2, 0.05, 0.01):
        for each in (rule, fresh):
            each.observe(error, 0.3)
        assert weights(rule) == weights(fresh)
    assert {k: v for k, v in rule.state_dict().items() if k != "objectives"} == {
        k: v for k, v in fresh.state_dict().items() if k != "objectives"
    }
    with pytest.raises(ValueError, match="the state is of HeldOut"):
        fresh.load_state_dict({"gram": torch.eye(1), "rule": "HeldOut"})


def test_one_objective_and_an_optimizer():
    w = torch.nn.Parameter(torch.ones(2))
    rule = WhileBetter()
    optimizer = dk.DTOSGD([w], lr=0.0, weighting=rule)
    rule.observe(0.9, 0.1)
    optimizer.backward([w.square().sum()])
    optimizer.step()
    assert optimizer.balance.weights.tolist() == [1.0]


def test_a_warning_where_nothing_is_compared():
    rule = rule_of()
    for _ in range(99):
        weights(rule)
    with pytest.warns(UserWarning, match="call observe"):
        weights(rule)
    weights(rule)  # and no second one


@pytest.mark.parametrize(
    ("options", "told"),
    [({"beta": 1.0}, "beta is 1.0"), ({"beta": float("nan")}, "beta is nan")],
)
def test_refused_options(options, told):
    with pytest.raises(ValueError, match=told):
        WhileBetter(**options)


def test_refused_calls():
    rule = rule_of()
    with pytest.raises(ValueError, match="primary is 'task', but the losses are"):
        rule.expect(("a", "b"))
    for bad in (-0.1, torch.ones(2), None, "0.1", [0.1], np.array([0.1, 0.2])):
        with pytest.raises(ValueError, match="student is"):
            rule.observe(bad, 0.1)
    assert rule.state_dict() == {}


def test_train_compares_on_held_out_images(digits, teacher, tmp_path, monkeypatch):
    seen, observe = [], WhileBetter.observe

    def watched(self, student, teacher):
        seen.append((float(student), float(teacher)))
        observe(self, student, teacher)

    monkeypatch.setattr(WhileBetter, "observe", watched)
    options = [*common(digits, tmp_path), *distilling(teacher), "--kd-balance", "whilebetter", "--kd-held-out", "0.25"]
    options += ["--kd-held-out-every", "2", "--opt", "adamw", "-b", "8", "--log-interval", "1", "--experiment", "x"]
    assert main(["train", *options]) == 0
    found = [float(row["weight_kl"]) for row in rows(tmp_path / "x" / "steps.csv")]
    assert len(seen) == -(-len(found) // 2)
    assert all(0 <= rate <= 1 for pair in seen for rate in pair)
    rule = WhileBetter("task")
    for i, weight in enumerate(found):
        if i % 2 == 0:
            rule.observe(*seen[i // 2])
        rule.expect(("task", "kl"))
        assert weight == pytest.approx(float(rule(torch.eye(2, dtype=torch.float64), ONES[:2])[1]))


def test_a_teacher_whose_classes_have_other_names_is_not_compared():
    """As many are not the same: it would be taken for one that is nearly always wrong."""
    student, model = (timm.create_model("test_resnet", num_classes=2) for _ in range(2))
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["cat", "dog"]}
    teacher = Teacher(model, "t", Normalisation.of(student))
    assert judged(teacher, student, ["cat", "dog"]) is not None
    assert judged(teacher, student) is not None
    assert judged(teacher, student, ["dog", "cat"]) is None


def test_a_teacher_without_the_classes_is_refused_before_training():
    from dtokd.objectives.task import DistillationTask

    class Student(torch.nn.Linear):
        num_classes = 4

    task = DistillationTask(Student(2, 4), None)
    with pytest.raises(UsageError, match="no teacher predicts the student's classes"):
        HeldOutImages([], 2, Classifiers(task), Namespace(weighting=WhileBetter("task")), nullcontext)


def test_the_students_errors_are_without_dropout():
    """Else it would seem worse than its teachers, which have none, and every look would move the random numbers."""
    from dtokd.objectives.task import DistillationTask

    class Student(torch.nn.Sequential):
        num_classes = 4

    torch.manual_seed(0)
    model = Student(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.7), torch.nn.Linear(3, 4)).train()
    images = torch.randn(256, 3)
    normal = (images - images.mean(0)) / (images.var(0, correction=0) + 1e-5).sqrt()
    labels = model[2](normal).argmax(1)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        (error,) = Classifiers(DistillationTask(model, None)).errors(images, labels)
    assert error == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
