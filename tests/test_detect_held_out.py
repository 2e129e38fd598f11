"""`dtokd detect --kd-balance whilebetter` and `heldout`: images that are never trained on set the weights."""

import argparse

import pytest
import timm
import torch
from dtokd.cli import main
from dtokd.detect.annotations import read_annotations
from dtokd.detect.batch import Detections
from dtokd.detect.evaluate import CocoEvaluator
from dtokd.detect.heldout import Detectors, split
from dtokd.errors import UsageError
from dtokd.objectives.judged import judged
from dtokd.objectives.taps import Taps
from dtokd.objectives.task import DistillationTask
from dtokd.objectives.teacher import Normalisation, Teacher
from dtokd.train.world import World
from safetensors.torch import save_file

from dtokd_kernels.weighting import HeldOut, WhileBetter

from .coco import FCOS, common
from .test_detect import dense, taught_by_fcos, vidt
from .test_train_resume import die_and_resume
from .written import rows

pytestmark = pytest.mark.usefixtures("one_thread")
HELD = ["--kd-held-out", "0.25", "--kd-held-out-every", "2", "--log-interval", "1", "--pictures", "0"]


@pytest.fixture(scope="module")
def teaching(tmp_path_factory):
    return [*FCOS, *taught_by_fcos(tmp_path_factory.mktemp("teacher")), "--kd-distill-type", "prediction"]


def weights_of(run):
    return [float(row["weight_prediction"]) for row in rows(run / "steps.csv")]


def test_errors_set_the_weight_and_a_killed_run_goes_on(coco, teaching, tmp_path, monkeypatch):
    seen, observe = [], WhileBetter.observe

    def watched(self, student, teacher):
        observe(self, student, teacher)
        seen.append((float(student), float(teacher)))

    # an untrained detector finds nothing: what the errors are is the next test's
    errors = Detectors.errors
    monkeypatch.setattr(Detectors, "errors", lambda self, *batch: errors(self, *batch) * torch.tensor([1.0, 0.5]))
    monkeypatch.setattr(WhileBetter, "observe", watched)
    options = ["detect", *common(coco, tmp_path / "a"), *teaching, *HELD, "--kd-balance", "whilebetter"]
    options += ["--opt", "dtoadamw", "--experiment", "x"]
    assert main(options) == 0
    weights = weights_of(tmp_path / "a" / "x")
    assert len(weights) == 6  # of the eight images two are held out
    assert seen == [(1.0, 0.5)] * 3
    assert weights == pytest.approx([0.5] * 6)
    die_and_resume(options, tmp_path, monkeypatch, 5)


@pytest.mark.parametrize("balance", ["heldout", "auto"])
def test_gradients_set_the_weights(coco, teaching, tmp_path, monkeypatch, balance):
    seen, observe = [], HeldOut.observe

    def watched(self, gram, names=()):
        observe(self, gram, names)
        seen.append(gram)

    monkeypatch.setattr(HeldOut, "observe", watched)
    options = [*common(coco, tmp_path), *teaching, *HELD, "--kd-balance", balance, "--opt", "adamw"]
    options += ["--kd-balance-kwargs", "window=2"] if balance == "auto" else []
    assert main(["detect", *options, "--experiment", "x"]) == 0
    weights = weights_of(tmp_path / "x")
    assert len(weights) == 6
    if balance == "heldout":
        assert len(seen) == 3
        assert all(gram.isfinite().all() and gram[2, 2] > 0 for gram in seen)
        assert len(set(weights[:2])) == len(set(weights[2:4])) == 1


def options_of(share):
    return argparse.Namespace(kd_held_out=share)


def test_held_out_images_are_not_trained_on(coco):
    whole = read_annotations(coco / "annotations" / "instances_train.json", coco / "train")
    trained, held = split(options_of(0.25), whole, World())
    names = [[image["file_name"] for image in part.content["images"]] for part in (trained, held, whole)]
    assert sorted(names[0] + names[1]) == sorted(names[2])
    assert len(names[1]) == 2
    assert split(options_of(0.25), whole, World())[1].content == held.content
    assert split(options_of(0.0), whole, World()) == (whole, None)
    for part in (trained, held):
        assert [image["id"] for image in part.content["images"]] == list(range(len(part.image_ids)))
        assert [a["id"] for a in part.content["annotations"]] == [
            i + 1 for i in range(len(part.content["annotations"]))
        ]
        for image, identity in zip(part.content["images"], part.image_ids, strict=True):
            number = whole.image_ids.index(identity)
            assert image["file_name"] == whole.content["images"][number]["file_name"]
            boxes = [
                [a["bbox"] for a in of.content["annotations"] if a["image_id"] == place]
                for of, place in ((part, image["id"]), (whole, number))
            ]
            assert boxes[0] == boxes[1]
    total = [sum(getattr(part.boxes, name) for part in (trained, held)) for name in ("objects", "degenerate", "crowds")]
    assert total == [whole.boxes.objects, whole.boxes.degenerate, whole.boxes.crowds]
    assert trained.empty + held.empty == whole.empty == 1
    assert max(trained.most, held.most) == whole.most


def test_an_error_is_what_the_evaluation_of_these_images_lacks(coco):
    """The student finds all boxes with the wrong class in one image, the teacher all with the right one."""
    whole = read_annotations(coco / "annotations" / "instances_train.json", coco / "train")
    targets = []
    for number in (4, 6):
        image = whole.content["images"][number]
        size = (image["height"], image["width"])
        objects = [a for a in whole.content["annotations"] if a["image_id"] == number]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([a["category_id"] for a in objects])
        held = {"image_id": whole.image_ids[number], "size": size, "original": size}
        targets.append({"boxes": boxes, "labels": labels, **held})
    assert all(len(t["labels"]) for t in targets)

    def found(first):
        pairs = zip(targets, (first, 0), strict=True)
        parts = [
            {"boxes": t["boxes"], "labels": (t["labels"] + k) % 3, "scores": torch.ones(len(t["labels"]))}
            for t, k in pairs
        ]
        return Detections(parts)

    judges = Detectors(DistillationTask(dense(), None), list(whole.categories.values()), whole, "ap50")

    class Finds(torch.nn.Module):
        def __init__(self, first):
            super().__init__()
            self.first = first

        def forward(self, images):
            return found(self.first)

    judges.student, judges.teachers = Finds(1), [Finds(0)]
    images = argparse.Namespace(pixels=torch.zeros(()))
    student, teacher = judges.errors(images, targets)
    assert teacher == 0
    evaluator = CocoEvaluator(whole.part([4, 6]))
    evaluator.update(found(1), targets)
    assert student == 1 - evaluator.compute()["ap50"]
    assert whole.part([4, 4, 6]) == whole.part([4, 6])  # with --on-bad-image skip a batch may have an image twice
    assert 0 < student < 1
    assert judges.student.training


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--kd-balance whilebetter --kd-held-out 0.1", "0.1 of 8 images are 1; hold out two at least"),
        ("--kd-balance dto --kd-held-out 0.25", "does not look at held-out images"),
    ],
)
def test_refusals(coco, teaching, tmp_path, capsys, more, message):
    options = [*common(coco, tmp_path), *teaching, "--opt", "dtoadamw", "--experiment", "x", *more.split()]
    assert main(["detect", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x" / "args.yaml").exists()


def test_a_backbone_has_no_errors_to_compare(coco, tmp_path, capsys):
    teacher = ["--kd-model-name", "test_resnet", "--kd-balance", "whilebetter", "--opt", "dtoadamw"]
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "t.safetensors")
    options = [*common(coco, tmp_path), *FCOS, *teacher, "--kd-teacher-path", str(tmp_path / "t.safetensors"), *HELD]
    assert main(["detect", *options, "--experiment", "x"]) == 2
    assert "no teacher predicts the student's classes" in capsys.readouterr().err


def test_a_teacher_is_judged_where_it_has_the_students_classes():
    """One of transformers names its classes, also where it was trained here: by LABEL_ and a number."""

    def of(model, student, names=None):
        return judged(Teacher(model, "t", Normalisation()), student, names)

    names = ["three", "seven", "ninety"]
    own, other = vidt(), vidt(7)
    assert of(other, own, names) is other
    assert of(other, own) is other
    for called, expected in ((["Three", "seven", "NINETY"], other), (["seven", "three", "ninety"], None)):
        other.net.config.id2label = dict(enumerate(called))
        assert of(other, own, names) is expected
    dense_one = dense()
    assert of(dense_one, own, names) is dense_one
    classifier = timm.create_model("test_resnet", num_classes=3)
    assert of(classifier, own, names) is None
    assert of(own, classifier) is None
    assert of(timm.create_model("test_resnet", num_classes=4), classifier) is None
    images = torch.randn(2, 3, 32, 32)
    frozen = Teacher(classifier.eval(), "t", Normalisation())
    found = judged(frozen, timm.create_model("test_vit", num_classes=3))
    assert torch.equal(found(images), frozen(images, Taps(logits=True)).logits)


def test_processes_need_an_image_each(coco):
    whole = read_annotations(coco / "annotations" / "instances_train.json", coco / "train")
    with pytest.raises(UsageError, match="fewer than the 3 processes"):
        split(options_of(0.25), whole, argparse.Namespace(size=3))
