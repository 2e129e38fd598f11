"""`dtokd predict`, `dtokd export`, and the model card: what comes out of a run is what the run has judged."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from dtokd import export as exporting
from dtokd.cli import main
from dtokd.detect.batch import Images
from dtokd.trained import load_trained
from PIL import Image
from safetensors.torch import load_file, save_file

from .coco import CATEGORIES, FCOS, write_coco
from .coco import common as coco_options
from .digits import common, distilling
from .refused import refused

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(digits, teacher, tmp_path_factory):
    """Of a student with statistics of its own, on other images than timm's."""
    torch.set_num_threads(1)
    options = [
        *common(digits, tmp_path_factory.mktemp("runs")),
        *distilling(teacher),
        "--mean",
        "0.4",
        "--crop-pct",
        "1",
    ]
    assert main(["train", *options, "--experiment", "digits", "--epochs", "1"]) == 0
    return next((tmp_path_factory.getbasetemp()).glob("runs*/digits"))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("detector")
    options = [*coco_options(write_coco(folder / "data"), folder), *FCOS, "--pictures", "0"]
    assert main(["detect", *options, "--experiment", "x", "--epochs", "1"]) == 0
    return folder


def lines(capsys, *arguments, code=0):
    assert main([str(a) for a in arguments]) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_predictions_are_those_that_the_run_was_judged_by(run, digits, capsys):
    """The share of right labels over the validation folder is the run's top1, whatever the batches."""
    folder = digits / "validation"
    told = lines(capsys, "predict", run, folder, "--top", 3, "-b", 7)
    right = [each["labels"][0]["label"] == each["image"].split("/")[-2] for each in told]
    summary = (run / "summary.csv").read_text().splitlines()
    top1 = float(summary[1].split(",")[summary[0].split(",").index("eval_top1")])
    assert len(told) == 30
    assert 100 * sum(right) / len(right) == pytest.approx(top1)
    for each in told:
        values = [label["probability"] for label in each["labels"]]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
    assert lines(capsys, "predict", run, folder, "--top", 3, "-b", 30) == told
    whole = lines(capsys, "predict", run, told[0]["image"], "--top", 99)[0]["labels"]
    assert sum(label["probability"] for label in whole) == pytest.approx(1, abs=1e-4)


def test_predictions_as_files(run, digits, tmp_path, capsys):
    """JSON and pictures; an image that cannot be read costs that image."""
    shutil.copy(next((digits / "validation" / "3").iterdir()), tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no image, and not asked for")
    told = lines(capsys, "predict", run, tmp_path, "--output", tmp_path / "out", code=1)
    assert [set(each) for each in told] == [{"image", "labels", "picture"}, {"image", "error"}]
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == told
    with Image.open(told[0]["picture"]) as picture:
        assert min(picture.size) >= 224
    # the picture of a picture would be the next result
    assert "pictures are drawn" in refused(capsys, "predict", run, tmp_path, "--output", tmp_path / "out")
    assert "there is no nowhere" in refused(capsys, "predict", run, "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no image" in refused(capsys, "predict", run, tmp_path / "empty")
    assert "is no run directory" in refused(capsys, "predict", tmp_path, tmp_path / "a.png")


def test_boxes_are_in_the_pixels_of_the_file(detector, capsys, tmp_path, monkeypatch):
    """Of any size, upright; their labels are the categories of the data."""
    from dtokd.detect.batch import Detections
    from dtokd.detect.detectors.dense import Dense

    def found(self, images):
        """One box over the right half of each image, and one that is not sure."""
        sizes = [torch.tensor([[w / 2, 0, w, h], [0, 0, 1, 1]]) for h, w in images.sizes]
        scores, labels = torch.tensor([0.9, 0.1]), torch.tensor([2, 0])
        return Detections([{"boxes": boxes, "scores": scores, "labels": labels} for boxes in sizes])

    monkeypatch.setattr(Dense, "forward", found)
    plain = Image.fromarray(np.full((100, 200, 3), 128, np.uint8))
    plain.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    plain.save(tmp_path / "b.jpg", exif=exif)
    told = lines(capsys, "predict", detector / "x", tmp_path, "--output", tmp_path / "out")
    assert [(each["width"], each["height"]) for each in told] == [(200, 100), (100, 200)]
    assert [[d["box"] for d in each["detections"]] for each in told] == [[[100, 0, 200, 100]], [[50, 0, 100, 200]]]
    last = max(CATEGORIES)
    assert {(d["label"], d["category_id"]) for each in told for d in each["detections"]} == {(CATEGORIES[last], last)}
    with Image.open(told[0]["picture"]) as picture:
        assert picture.getpixel((picture.width // 2, picture.height // 2))[2] < 100  # the box's edge is orange
    assert len(lines(capsys, "predict", detector / "x", tmp_path / "a.png", "--threshold", 0.05)[0]["detections"]) == 2


def test_detector_finds_what_the_evaluation_has_found(detector, capsys):
    """The model is the run's: its scores are those of the detector itself."""
    from dtokd.detect.data import CocoImages, collate, make_transforms, read_split

    trained = load_trained(detector / "x", "test")
    split = read_split(trained.settings, "val")
    images = CocoImages(detector / "data" / "val", split, make_transforms(trained.settings, training=False))
    batch, _ = collate([images[0]])
    with torch.no_grad():
        expected = trained.model(batch).images[0]["scores"]
    told = lines(capsys, "predict", detector / "x", detector / "data" / "val" / "0.png", "--threshold", 0)
    assert [d["score"] for d in told[0]["detections"]] == pytest.approx(expected.tolist(), abs=1e-5)


def test_folder_that_timm_loads(run, tmp_path, capsys):
    """`timm.create_model("local-dir:FOLDER", pretrained=True)` is the run's student, bit for bit."""
    (told,) = lines(capsys, "export", run, "--output", tmp_path / "out")
    assert told["largest_difference"] == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    weights = load_file(run / "student.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert timm.data.resolve_data_config(model=model)["mean"] == [0.4, 0.4, 0.4]
    assert model.pretrained_cfg["label_names"] == [str(i) for i in range(10)]
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), load_trained(run, "test").model(images))
    # of the run's results only those of the weights that it has
    assert "| top1 |" in (tmp_path / "out" / "README.md").read_text()
    lines(capsys, "export", run, "--output", tmp_path / "out", "--checkpoint", run / "student-last.safetensors")
    assert "| top1 |" not in (tmp_path / "out" / "README.md").read_text()


def test_program_of_torch(run, capsys):
    """For any number of images; without an output folder it is in the run."""
    (told,) = lines(capsys, "export", run, "--format", "torch")
    assert told["largest_difference"] <= told["tolerance"] == 1e-4
    program = torch.export.load(run / "export" / "torch" / "student.pt2").module()
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = load_trained(run, "test").model(images)
        torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-5)
        assert program(images[:1]).shape == (1, 10)


def test_program_of_a_detector(detector, capsys):
    """All predictions, for any number of images: its best ones are those that the detector chooses among."""
    (told,) = lines(capsys, "export", detector / "x", "--format", "torch")
    assert told["input"] == [3, 64, 64]
    program = torch.export.load(detector / "x" / "export" / "torch" / "student.pt2").module()
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        scores, boxes = program(images)
        trained = load_trained(detector / "x", "test").model
        found = trained(Images(images, torch.ones(3, 64, 64, dtype=torch.bool), [(64, 64)] * 3)).images
    assert (scores.shape[0], boxes.shape[2], scores.shape[1]) == (3, 4, boxes.shape[1])
    for i, each in enumerate(found):
        place = scores[i].flatten().argmax()
        assert scores[i].max() == pytest.approx(float(each["scores"][0]), rel=1e-4)
        assert int(each["labels"][0]) == int(place) % scores.shape[2]
        best = boxes[i, int(place) // scores.shape[2]].clamp(0, 64)
        torch.testing.assert_close(each["boxes"][0], best, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore")  # of onnx and onnxscript
def test_onnx(run, tmp_path, capsys):
    """Another program computes the run's outputs, for any number of images."""
    runtime = pytest.importorskip("onnxruntime", reason="no onnxruntime")
    (told,) = lines(capsys, "export", run, "--format", "onnx", "--output", tmp_path)
    assert told["images"] == 16
    assert told["largest_difference"] <= 1e-4
    session = runtime.InferenceSession(str(tmp_path / "student.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 32, 32)
    (got,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), load_trained(run, "test").model(images), rtol=1e-3, atol=1e-4)


def test_exports_that_are_refused(run, detector, digits, tmp_path, capsys, monkeypatch):
    """Packages that are not there, data that is gone, and a program that computes something else."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        assert "pip install 'dtokd-kernels[onnx]'" in refused(capsys, "export", run, "--format", "onnx")
    assert "--data-dir: nowhere does not exist" in refused(capsys, "export", run, "--data-dir", "nowhere")
    assert "holds a detector, which timm does not load" in refused(capsys, "export", detector / "x")
    other = load_trained(run, "test").model
    with torch.no_grad():
        other.get_classifier().bias += 1
    save_file({name: value.clone() for name, value in other.state_dict().items()}, tmp_path / "other.safetensors")
    out = tmp_path / "out"
    monkeypatch.setattr(exporting, "_timm", lambda *_: (out / "model.safetensors").write_bytes(b"x") and other)
    assert "--tolerance: 0.0001, but the exported model differs" in refused(capsys, "export", run, "--output", out)
    assert not (out / "model.safetensors").exists()
    bad = tmp_path / "bad.safetensors"
    save_file({"x": torch.zeros(1)}, bad)
    assert "--checkpoint" in refused(capsys, "export", run, "--checkpoint", bad)


def test_model_card_of_a_run(run, detector):
    """What was trained from what, how good it is, and how it is loaded; the code of the card runs."""
    text = (run / "README.md").read_text()
    for part in ("`test_resnet`, distilled from `test_resnet`", "| top1 |", "teacher test_resnet", "374 k parameters",
                 "64 images of 10 classes", "1 of 1 epochs", "mean [0.4, 0.4, 0.4]"):  # fmt: skip
        assert part in text, part
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace('"digits/', f'"{run}/')
    names = {}
    exec(code.replace('"local-dir:digits"', f'"local-dir:{run}"'), names)
    weights = load_file(run / "student.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in names["model"].state_dict().items())
    card = (detector / "x" / "README.md").read_text()
    assert "trained without a teacher by `dtokd detect`" in card
    assert "| ap |" in card
