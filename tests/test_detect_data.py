"""`dtokd detect`: what is read, what is refused, how it is judged."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from dtokd.cli import main
from dtokd.detect import install
from dtokd.detect import options as detect_options
from dtokd.detect.annotations import read_annotations
from dtokd.detect.batch import Detections
from dtokd.detect.data import CocoImages, collate, index, make_transforms
from dtokd.detect.errors import KINDS, _Matched, split_errors
from dtokd.detect.evaluate import CocoEvaluator
from pycocotools.cocoeval import COCOeval

from .coco import CATEGORIES, FCOS, VIDT, common, edited, write_coco

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco") / "data")


def settings(*texts):
    parser = argparse.ArgumentParser()
    detect_options.add_arguments(parser)
    return parser.parse_args(list(texts))


def dataset(coco, *texts, training=False):
    annotations = read_annotations(coco / "annotations" / "instances_train.json", coco / "train")
    transforms = make_transforms(settings("--img-size", "48", "--max-size", "96", *texts), training)
    return CocoImages(coco / "train", annotations, transforms), annotations


def test_targets(coco):
    """Category ids with gaps are labels from 0; crowds and boxes without area are not learned; none is fine."""
    images, annotations = dataset(coco)
    assert annotations.categories == dict(sorted(CATEGORIES.items()))
    assert (annotations.crowds, annotations.degenerate, annotations.empty) == (1, 1, 1)
    truth = json.loads(annotations.path.read_text())["annotations"]
    for number in range(len(images)):
        pixels, target = images[number]
        own = [a for a in truth if a["image_id"] == number and not a["iscrowd"] and a["bbox"][2] > 0]
        assert [list(CATEGORIES)[k] for k in target["labels"].tolist()] == [a["category_id"] for a in own]
        assert pixels.dtype == torch.float32
        assert 0 <= pixels.min() <= pixels.max() <= 1
        height, width = target["original"]
        scale = 48 / min(height, width)
        expected = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]).reshape(-1, 4)
        torch.testing.assert_close(target["boxes"].as_subclass(torch.Tensor), expected * scale)
    assert images[1][1]["boxes"].shape == (0, 4)


def test_batches_are_padded(coco):
    images, _ = dataset(coco)
    batch, targets = collate([images[0], images[1]])
    assert batch.pixels.shape == (2, 3, 64, 64)
    assert batch.sizes == [(64, 48), (48, 64)]
    assert torch.equal(batch.mask.sum((1, 2)), torch.tensor([64 * 48] * 2))
    assert batch.pixels[0, :, :, 48:].abs().max() == 0
    assert type(targets[0]["boxes"]) is torch.Tensor
    square, _ = dataset(coco, "--square")
    assert square[0][0].shape == (3, 48, 48)


def test_augmented_boxes_stay_inside(coco):
    texts = ["--crop", "--hflip", "0.5", "--color-jitter", "0.4", "--scales", "32", "48", "64"]
    images, _ = dataset(coco, *texts, training=True)
    sizes = set()
    for _ in range(10):
        for number in range(len(images)):
            pixels, target = images[number]
            sizes.add(tuple(pixels.shape[1:]))
            boxes = target["boxes"].as_subclass(torch.Tensor)
            assert len(boxes) == len(target["labels"])
            assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
            assert (boxes >= 0).all()
            assert (boxes <= torch.tensor([pixels.shape[2], pixels.shape[1]] * 2)).all()
    assert len(sizes) > 6


def found(boxes, labels, scores):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "scores": torch.tensor(scores)}


def test_perfect_detections(coco):
    """AP 1 on resized images; what is not there (large objects) is NaN; nothing is AP 0.

    COCO's tools count boxes without area too, and nobody can find them.
    """
    images, annotations = dataset(coco)
    annotations.content["annotations"] = [a for a in annotations.content["annotations"] if a["bbox"][2]]
    evaluator, nothing = CocoEvaluator(annotations), CocoEvaluator(annotations)
    for number in range(len(images)):
        _, targets = collate([images[number]])
        (t,) = targets
        detections = Detections([found(t["boxes"].tolist(), t["labels"].tolist(), [0.9] * len(t["labels"]))])
        evaluator.update(detections, targets)
        evaluator.update(Detections([found([], [], [])]), targets)  # it has come already
        nothing.update(Detections([found([], [], [])]), targets)
    metrics = evaluator.compute()
    assert metrics["ap"] == metrics["ap50"] == metrics["ap_small"] == pytest.approx(1)
    assert np.isnan(metrics["ap_large"])
    assert sum(metrics[f"error_{kind}"] for kind in KINDS) == pytest.approx(0)
    metrics = nothing.compute()
    assert metrics["ap"] == 0
    assert metrics["error_missed"] == 0  # with no detection at all, asking for less finds no more


def random_detections(truth, seed):
    """Rows as the evaluator makes them: near objects, of wrong classes, twice, and anywhere."""
    random = np.random.default_rng(seed)
    rows = []
    for a in truth.dataset["annotations"]:
        for _ in range(random.integers(0, 4)):
            box = np.array(a["bbox"]) + random.normal(0, 3, 4)
            category = a["category_id"] if random.random() < 0.7 else random.choice(list(CATEGORIES))
            rows.append([a["image_id"], *np.maximum(box, 1), random.random(), category])
    for _ in range(10):
        rows.append([random.integers(8), *random.uniform(1, 30, 4), random.random(), random.choice(list(CATEGORIES))])
    return np.array(rows, dtype=float)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(5))
def test_errors_start_from_cocos_ap50(coco, seed, capsys):
    """Crowds and boxes without width included."""
    _, annotations = dataset(coco)
    truth = index(annotations.content)
    rows = random_detections(truth, seed)
    judged = COCOeval(truth, truth.loadRes(rows), "bbox")
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    capsys.readouterr()
    pairs = _Matched(truth)
    for image in truth.imgs:
        pairs.add(image, rows[rows[:, 0] == image])
    assert pairs.ap50() == pytest.approx(judged.stats[1], abs=1e-12)
    assert all(value >= -1e-12 for value in split_errors(truth, rows).values())


def small_truth(*objects):
    annotations = [
        {"id": i + 1, "image_id": 0, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, (c, box) in enumerate(objects)
    ]
    images = [{"id": 0, "file_name": "0.png", "width": 100, "height": 100}]
    return index(
        {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}
    )


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("classification", [[0, 10, 10, 20, 20, 0.9, 2]]),
        ("localisation", [[0, 20, 10, 20, 20, 0.9, 1]]),
        ("both", [[0, 20, 10, 20, 20, 0.9, 2], [0, 80, 80, 10, 10, 0.5, 2]]),
        ("duplicate", [[0, 10, 10, 20, 20, 0.9, 1], [0, 10, 11, 20, 20, 0.8, 1], [0, 60, 60, 20, 20, 0.7, 1]]),
        ("background", [[0, 80, 10, 15, 15, 0.9, 1], [0, 10, 10, 20, 20, 0.8, 1], [0, 60, 60, 20, 20, 0.7, 1]]),
        ("missed", [[0, 10, 10, 20, 20, 0.9, 1]]),
    ],
)
def test_each_error_is_named(kind, rows):
    truth = small_truth((1, [10, 10, 20, 20]), (1, [60, 60, 20, 20]), (2, [80, 80, 10, 10]))
    errors = split_errors(truth, np.array(rows, dtype=float))
    assert errors[kind] > 0.05
    for other in KINDS:
        if other not in (kind, "missed"):
            assert errors[other] == pytest.approx(0), other


BAD = {
    "a file that is missing": lambda c: c["images"][0].update(file_name="absent.png"),
    "is of image 77, which the file does not list": lambda c: c["annotations"][0].update(image_id=77),
    "is of category 5, which": lambda c: c["annotations"][0].update(category_id=5),
    "has no box to learn from": lambda c: c.update(annotations=[]),
    "the categories of": lambda c: c["categories"][0].update(name="other"),
    "has no bbox of x, y, width, height": lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
    "is not as COCO has it: KeyError 'bbox'": lambda c: c["annotations"][0].pop("bbox"),
    "several images of one id": lambda c: c["images"][0].update(id=1),
    "must be whole numbers": lambda c: c["images"][0].update(width="64"),
    "has no lists images": lambda c: c.pop("images"),
    "has 10 queries, but an image of": lambda c: c["annotations"].extend(
        {"id": 100 + i, "image_id": 0, "category_id": 3, "bbox": [i, i, 9, 9]} for i in range(11)
    ),
}


def fails(capsys, *texts):
    code = main(["detect", *map(str, texts)])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("dtokd detect: error: ")
    return error


@pytest.mark.parametrize("message", BAD)
def test_bad_annotations(coco, tmp_path, capsys, message):
    """Before anything is written."""
    data = edited(coco, tmp_path / "data", "train", BAD[message])
    error = fails(capsys, *common(data, tmp_path / "runs"), *VIDT)
    assert message.replace("a file that is missing", "1 of 8 images") in error
    assert ("absent.png" in error) == ("a file" in message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("--data-dir nowhere", "--data-dir: nowhere is no folder"),
        ("--val-split test", "has no folder 'test'"),
        ("--model yolo", "'yolo' is neither vidt_nano"),
        ("--model fcos:nobody", "timm has no model 'nobody'"),
        ("--model fcos:vit_tiny_patch16_224", "gives no maps of strides"),
        ("--model fcos:test_resnet --model-kwargs speed=1", "known are width"),
        ("--model vidt_nano --model-kwargs speed=1", "DeformableDetrConfig has no speed"),
        ("--model vidt_nano --pretrained --model-kwargs", "no published weights"),
        ("--model vidt_nano --backbone-checkpoint nowhere --model-kwargs", "is no directory with a Swin"),
        ("--backbone-checkpoint nowhere", "there is no file nowhere"),
        ("--initial-checkpoint nowhere", "--initial-checkpoint: there is no file nowhere"),
        ("--kd-model-name fcos:test_resnet", "--kd-teacher-path: missing"),
        ("--kd-teacher-path x", "there is no teacher"),
        ("--kd-balance dto", "without a teacher there is one objective"),
        ("-b 9", "'train' holds 8 images"),
        ("--opt nobody", "no optimizer is called 'nobody'"),
    ],
)
def test_bad_options(coco, tmp_path, capsys, texts, message):
    assert message in fails(capsys, *common(coco, tmp_path / "runs"), *FCOS, *texts.split())
    assert not (tmp_path / "runs").exists()


def test_bad_image(coco, tmp_path, capsys):
    """An image that cannot be read: an error with its name, or its neighbour twice in training, once in AP."""
    data = tmp_path / "data"
    shutil.copytree(coco, data)
    (data / "train" / "0.png").write_bytes((coco / "train" / "1.png").read_bytes())
    assert "it has (64, 48) pixels, the annotations say 48 x 64" in fails(capsys, *common(data, tmp_path / "r"), *FCOS)
    shutil.copy(coco / "train" / "0.png", data / "train" / "0.png")
    (data / "val" / "3.png").write_bytes(b"no picture")
    assert "image 3.png of 'val' cannot be read" in fails(capsys, *common(data, tmp_path / "runs"), *FCOS)
    options = [*common(data, tmp_path / "skip"), *FCOS, "--on-bad-image", "skip", "--epochs", "1"]
    assert main(["detect", *options]) == 0
    assert "skipped image: val: 3.png" in capsys.readouterr().out


def test_one_process(coco, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "only dtokd train needs" in fails(capsys, *common(coco, tmp_path), *FCOS)


def test_missing_packages(monkeypatch, capsys):
    find = install.find_spec
    monkeypatch.setattr(install, "find_spec", lambda name: None if name == "pycocotools" else find(name))
    assert "pip install 'dtokd-kernels[detect]'" in fails(capsys)
    assert "pip install 'dtokd-kernels[demo]'" in fails(capsys, "--demo")
