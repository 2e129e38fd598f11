"""`dtokd detect`: what is read, what is refused, how it is judged."""

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
from dtokd.detect.data import CocoImages, collate, index, make_transforms, small_boxes
from dtokd.detect.errors import KINDS, _Matched, split_errors
from dtokd.detect.evaluate import CocoEvaluator
from dtokd.values import parser_of
from PIL import Image
from pycocotools.cocoeval import COCOeval

from .coco import CATEGORIES, FCOS, VIDT, common, edited

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(*texts):
    return parser_of(detect_options).parse_args(list(texts))


def dataset(coco, *texts, training=False):
    annotations = read_annotations(coco / "annotations" / "instances_train.json", coco / "train")
    transforms = make_transforms(settings("--img-size", "48", "--max-size", "96", *texts), training)
    return CocoImages(coco / "train", annotations, transforms), annotations


def test_targets(coco):
    """Category ids with gaps are labels from 0; crowds and boxes without area are not learned; none is fine."""
    images, annotations = dataset(coco)
    assert annotations.categories == dict(sorted(CATEGORIES.items()))
    assert (annotations.boxes.crowds, annotations.boxes.degenerate, annotations.empty) == (1, 1, 1)
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
    assert np.isnan(metrics["ap_large"])
    assert nothing.details()["ap"] == [0.0 if count else None for count in nothing.details()["objects"]]
    assert np.isnan(CocoEvaluator(annotations.part([1])).average_precision())  # an image without a box
    assert metrics["error_missed"] == 0  # with no detection at all, asking for less finds no more


def random_detections(truth, seed):
    """Rows as the evaluator makes them: near objects, of wrong classes, twice, and anywhere."""
    random = np.random.default_rng(seed)
    rows = []
    for a in truth.dataset["annotations"]:
        for _ in range(random.integers(0, 4)):
            box = np.array(a["bbox"]) + random.normal(0, 3, 4)
            category = a["category_id"] if random.random() < 0.7 else random.integers(3)
            rows.append([a["image_id"], *np.maximum(box, 1), random.random(), category])
    for _ in range(10):
        rows.append([random.integers(8), *random.uniform(1, 30, 4), random.random(), random.integers(3)])
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


def first(change):
    """To the first annotation."""
    return lambda content: change(content["annotations"][0])


def every(change):
    """To each annotation's box."""

    def changed(content):
        size = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for a in content["annotations"]:
            a["bbox"] = [float(value) for value in change(np.array(a["bbox"]), np.array(size[a["image_id"]] * 2))]

    return changed


BAD = {
    "1 of 8 images": lambda c: c["images"][0].update(file_name="absent.png"),
    "annotations[0] (id 1) is of image 77, which the file does not list": first(lambda a: a.update(image_id=77)),
    "is of image '0', which the file does not list": first(lambda a: a.update(image_id="0")),
    "is of category 5, which": first(lambda a: a.update(category_id=5)),
    "annotations[0] (id 1) has the image_id null; write a whole number or a text": first(lambda a: a.pop("image_id")),
    "has the category_id 3.5; write a whole number": first(lambda a: a.update(category_id=3.5)),
    "annotations[0] is 3, not an object": lambda c: c["annotations"].insert(0, 3),
    "has no box to learn from": lambda c: c.update(annotations=[]),
    "the categories of": lambda c: c["categories"][0].update(name="other"),
    "has no bbox of x, y, width, height, four numbers in pixels, but [1, 2, 3]": first(
        lambda a: a.update(bbox=[1, 2, 3])
    ),
    "but null": first(lambda a: a.pop("bbox")),
    'but [1, 2, "3", 4]': first(lambda a: a.update(bbox=[1, 2, "3", 4])),
    "but [1, 2, NaN, 4]": first(lambda a: a.update(bbox=[1, 2, float("nan"), 4])),
    "but [true, 2, 3, 4]": first(lambda a: a.update(bbox=[True, 2, 3, 4])),
    'annotations[0] (id 1) has the area "400"; write its pixels, or leave it out': first(
        lambda a: a.update(area="400")
    ),
    "has the area -4": first(lambda a: a.update(area=-4)),
    "has the area Infinity": first(lambda a: a.update(area=float("inf"))),
    'has the iscrowd "0"; write 0 or 1': first(lambda a: a.update(iscrowd="0")),
    "has the iscrowd 2": first(lambda a: a.update(iscrowd=2)),
    "images[1] has the id 0 of images[0]": lambda c: c["images"][1].update(id=0),
    "images[0] has the id null": lambda c: c["images"][0].pop("id"),
    "images[0] has the id true": lambda c: c["images"][0].update(id=True),
    "images[0] has the file_name null": lambda c: c["images"][0].pop("file_name"),
    'images[0] (0.png) has the width "64"; widths and heights must be whole numbers': lambda c: c["images"][0].update(
        width="64"
    ),
    "has the height 0;": lambda c: c["images"][0].update(height=0),
    "has the height 63.5;": lambda c: c["images"][0].update(height=63.5),
    "has the width null": lambda c: c["images"][0].pop("width"),
    "categories[0] has the id [90]": lambda c: c["categories"][0].update(id=[90]),
    "categories[1] has the id 90 of another category": lambda c: c["categories"][1].update(id=90),
    "categories[0] has the name null": lambda c: c["categories"][0].pop("name"),
    "has no lists images": lambda c: c.pop("images"),
    "has 10 queries, but an image of": lambda c: c["annotations"].extend(
        {"id": 100 + i, "image_id": 0, "category_id": 3, "bbox": [i, i, 9, 9]} for i in range(11)
    ),
    "so they are fractions of the image; COCO's bbox is": every(lambda box, size: box / size),
    "would not if they were two corners; COCO's bbox is": every(lambda box, size: np.add(box, [0, 0, *box[:2]])),
    "boxes have no area and 0 are outside their image": every(lambda box, size: box * [1, 1, 0, 1]),
    "are outside their image, so there is next to nothing": every(lambda box, size: np.add(box, [70, 0, 0, 0])),
    "are less than a pixel wide or high in images of 48": every(lambda box, size: box * [1, 1, 0.02, 1]),
}


def fails(capsys, *texts):
    code = main(["detect", *map(str, texts)])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("dtokd detect: error: ")
    return error


@pytest.mark.parametrize("message", BAD)
def test_bad_annotations(coco, tmp_path, capsys, message):
    """Before anything is written, in one line."""
    data = edited(coco, tmp_path / "data", "train", BAD[message])
    error = fails(capsys, *common(data, tmp_path / "runs"), *VIDT)
    assert message in error
    assert error.count("\n") == 1
    assert ("absent.png" in error) == (message == "1 of 8 images")
    assert not (tmp_path / "runs").exists()


def perfect(annotations, score=0.9):
    """What the evaluation makes of the boxes themselves."""
    evaluator, by_image = CocoEvaluator(annotations), {}
    for a in annotations.content["annotations"]:
        if a["bbox"][2] and not a["iscrowd"]:
            by_image.setdefault(a["image_id"], []).append(a)
    for image in annotations.content["images"]:
        size = image["height"], image["width"]
        own = by_image.get(image["id"], [])
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]
        detections = Detections([found(boxes, [a["category_id"] for a in own], [score] * len(own))])
        evaluator.update(detections, [{"image_id": annotations.image_ids[image["id"]], "size": size, "original": size}])
    return evaluator.compute()


def renamed(image=lambda i: i, category=lambda i: i, identity=lambda n, i: i):
    """Other ids for images, categories and the annotations, the n-th of which has the id i."""

    def change(content):
        content["annotations"] = [a for a in content["annotations"] if a["bbox"][2]]
        for n, a in enumerate(content["annotations"]):
            a["id"] = identity(n, a["id"])
            a["image_id"], a["category_id"] = image(a["image_id"]), category(a["category_id"])
        for entry in content["images"]:
            entry["id"] = image(entry["id"])
        for entry in content["categories"]:
            entry["id"] = category(entry["id"])

    return change


def without(*keys):
    def change(content):
        renamed()(content)
        for a in content["annotations"]:
            for key in keys:
                del a[key]

    return change


def with_null(content):
    renamed()(content)
    for a in content["annotations"]:
        if not a["iscrowd"]:
            a.update(area=None, iscrowd=None, id=None)


ACCEPTED = {
    "as it is": renamed(),
    "annotation ids from 0": renamed(identity=lambda n, i: n),
    "annotation ids that repeat": renamed(identity=lambda n, i: n % 2),
    "annotation ids that are text": renamed(identity=lambda n, i: f"a{i}"),
    "no annotation ids": without("id"),
    "no area": without("area"),
    "null": with_null,
    "image ids above 2^53": renamed(image=lambda i: 2**53 + 1 + 2 * i),
    "image ids of 20 digits": renamed(image=lambda i: 20260915123456781234 + i),
    "image ids that are text": renamed(image=lambda i: f"2026/{i}.png"),
    "image ids that are whole floats": renamed(image=float),
    "category ids above 2^53": renamed(category=lambda i: 2**60 + i),
    "category ids that are text": renamed(category=lambda i: f"c{i:02}"),
    "numbers and texts in fields that nobody reads": lambda c: (
        renamed()(c),
        c.update(info=3, licenses="none"),
        [a.update(segmentation=7, ignore="x", attributes=[None]) for a in c["annotations"]],
        [image.update(date_captured=5, license=[]) for image in c["images"]],
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_ids_and_missing_fields_mean(coco, tmp_path, name):
    """The same targets, and AP 1 of perfect detections."""
    expected = dataset(edited(coco, tmp_path / "plain", "train", ACCEPTED["as it is"]))[0]
    images, annotations = dataset(edited(coco, tmp_path / "data", "train", ACCEPTED[name]))
    metrics = perfect(annotations)
    assert metrics["ap"] == pytest.approx(1)
    assert sum(metrics[f"error_{kind}"] for kind in KINDS) == pytest.approx(0)
    file = json.loads(annotations.path.read_text())
    for number, entry in enumerate(file["images"]):
        _, own = images[number]
        _, target = expected[number]
        assert own["image_id"] == entry["id"]
        assert torch.equal(own["boxes"], target["boxes"])
        assert torch.equal(own["labels"], target["labels"])
    assert list(annotations.categories) == sorted(entry["id"] for entry in file["categories"])


def test_detections_that_are_not_finite_find_nothing(coco, tmp_path):
    _, annotations = dataset(edited(coco, tmp_path / "data", "train", ACCEPTED["as it is"]))
    assert perfect(annotations, score=float("nan"))["ap"] == 0


def test_boxes_that_training_drops_are_counted(coco, tmp_path, capsys):
    """In one line, before training; images that share a file in another."""

    def change(content):
        boxes = [a for a in content["annotations"] if a["bbox"][2] and not a["iscrowd"]]
        boxes[0]["bbox"] = [100, 10, 5, 5]
        boxes[1]["bbox"][2] = 100
        boxes[2]["bbox"][2] = 0.5
        content["annotations"].append({**boxes[3], "id": 99})
        content["images"].append({**content["images"][0], "id": 99})

    data = edited(coco, tmp_path / "data", "train", change)
    assert main(["detect", *common(data, tmp_path / "runs"), *FCOS, "--epochs", "1", "--pictures", "0"]) == 0
    told = capsys.readouterr().out.splitlines()
    count = read_annotations(data / "annotations" / "instances_train.json", data / "train").boxes.objects
    lines = [line for line in told if line.startswith("instances_train.json: warning: ")]
    assert len(lines) == 2
    assert f"of {count} boxes 1 have no area" in lines[0]
    for text in (
        "1 are outside their image",
        "1 reach beyond their image",
        "1 are there twice",
        "1 are less than a pixel wide or high at --img-size 48",
    ):
        assert text in lines[0]
    assert "1 images are listed more than once" in lines[1]
    assert told.index(lines[1]) < next(i for i, line in enumerate(told) if "of 1 epochs" in line)


@pytest.mark.parametrize("square", [False, True])
def test_counted_boxes_are_those_that_training_drops(coco, tmp_path, square):
    """Against the transforms themselves, at sizes around a pixel."""

    def change(content):
        for n, a in enumerate(content["annotations"]):
            a["bbox"][2 + n % 2] = 0.4 + 0.1 * n
            a["bbox"][n % 2] -= 0.05 * n

    data = edited(coco, tmp_path / "data", "train", change)
    options = ["--img-size", "40", "--max-size", "50", "--hflip", "0", *(["--square"] if square else [])]
    images, annotations = dataset(data, *options, training=True)
    kept = sum(len(images[number][1]["boxes"]) for number in range(len(images)))
    boxes, small = annotations.boxes, small_boxes(annotations, settings(*options))
    assert 0 < small < boxes.objects
    assert kept == boxes.objects - boxes.degenerate - boxes.outside - small


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("size", "format"),
    [("upright", "jpg"), ("stored", "jpg"), ("square", "jpg"), ("upright", "png"), ("upright", "tif")],
)
def test_photographs_are_read_upright(tmp_path, orientation, size, format):
    """The box is where the object is as a viewer shows it; where the noted size is the stored one, as it is stored."""
    width, height = (48, 48) if size == "square" else (64, 48)
    upright = np.full((height, width, 3), 100, np.uint8)
    upright[5:15, 30:46] = (255, 0, 0)
    shown = Image.fromarray(upright)
    # what a camera stores, such that the orientation brings it upright
    turns = [None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM"]
    turns += ["TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"]
    turn = turns[orientation - 1]
    stored = shown if turn is None else shown.transpose(Image.Transpose[turn])
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "train").mkdir()
    file = tmp_path / "train" / f"0.{format}"
    stored.save(file, exif=exif, **({"quality": 95, "subsampling": 0} if format == "jpg" else {}))
    as_stored = size == "stored" and stored.size != shown.size
    image = stored if as_stored else shown
    where = np.argwhere(np.asarray(image)[..., 1] < 50)
    (top, left), (bottom, right) = where.min(0).tolist(), (where.max(0) + 1).tolist()
    box = [left, top, right - left, bottom - top]
    content = {
        "images": [{"id": 1, "file_name": file.name, "width": image.width, "height": image.height}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box}],
        "categories": [{"id": 1, "name": "red"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    annotations = read_annotations(tmp_path / "a.json", tmp_path / "train")
    pixels, target = CocoImages(tmp_path / "train", annotations, None)[0]
    assert pixels.size == image.size
    x0, y0, x1, y1 = map(int, target["boxes"][0].tolist())
    inside = np.zeros((pixels.height, pixels.width), bool)
    inside[y0:y1, x0:x1] = True
    red = np.asarray(pixels)[..., 1] < 60
    assert (red == inside).mean() > 0.98


def test_damaged_exif_turns_nothing(tmp_path):
    shown = Image.fromarray(np.zeros((48, 64, 3), np.uint8))
    # an orientation that is a text
    entry = b"\x01\x00\x12\x01\x02\x00\x02\x00\x00\x00a\x00\x00\x00\x00\x00\x00\x00"
    shown.save(tmp_path / "0.jpg", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + entry)
    with Image.open(tmp_path / "0.jpg") as stored:
        assert stored.getexif()[0x0112] == "a"
    image = {"id": 1, "file_name": "0.jpg", "width": 64, "height": 48}
    annotation = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}
    content = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    images = CocoImages(tmp_path, read_annotations(tmp_path / "a.json", tmp_path), None)
    assert images[0][0].size == (64, 48)


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
    assert "it has (64, 48) pixels, the annotations have 48 x 64" in fails(
        capsys, *common(data, tmp_path / "r"), *FCOS, "--on-bad-image", "error"
    )
    shutil.copy(coco / "train" / "0.png", data / "train" / "0.png")
    (data / "val" / "3.png").write_bytes(b"no picture")
    refused = [*common(data, tmp_path / "runs"), *FCOS, "--on-bad-image", "error"]
    assert "image 3.png of 'val' cannot be read" in fails(capsys, *refused)
    options = [*common(data, tmp_path / "skip"), *FCOS, "--epochs", "1"]
    assert main(["detect", *options]) == 0
    assert "skipped image: val: 3.png" in capsys.readouterr().out
    (run,) = (tmp_path / "skip").iterdir()
    for number in (1, 1, 0):  # the last after a repair
        if not number:
            shutil.copy(coco / "val" / "3.png", data / "val" / "3.png")
        assert main(["eval", str(run)]) == 0
        assert json.loads(capsys.readouterr().out).get("skipped_images", 0) == number


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_more_than_eight_bits(coco, tmp_path, capsys, kind):
    """Pillow would make almost all of it white."""
    data = shutil.copytree(coco, tmp_path / "data")
    with Image.open(data / "train" / "0.png") as image:
        deep = np.asarray(image.convert("L")).astype(kind) * 200
    name = "0.png" if kind == "uint16" else "0.tiff"
    Image.fromarray(deep).save(data / "train" / name)
    if name != "0.png":
        (data / "train" / name).replace(data / "train" / "0.png")  # Pillow looks at the contents
    error = fails(capsys, *common(data, tmp_path / "runs"), *FCOS, "--on-bad-image", "error")
    assert "image 0.png of 'train' cannot be read" in error
    assert "more than 8 bits per value" in error


def test_the_demo_is_one_process(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "which only dtokd train and dtokd detect need; start it without torchrun" in fails(capsys, "--demo")


def test_missing_packages(monkeypatch, capsys):
    find = install.find_spec
    monkeypatch.setattr(install, "find_spec", lambda name: None if name == "pycocotools" else find(name))
    assert "pip install 'dtokd-kernels[detect]'" in fails(capsys)
    assert "pip install 'dtokd-kernels[demo]'" in fails(capsys, "--demo")
