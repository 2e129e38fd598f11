"""A small data set in COCO's format (scikit-learn's digits on gray), and options for runs of seconds on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

#: Ids have gaps; labels are 0, 1, 2.
CATEGORIES = {3: "three", 7: "seven", 90: "ninety"}
#: A ViDT-like detector of a quarter of a million parameters.
TINY = [
    *("encoder_layers=0", "num_queries=10", "d_model=32", "decoder_layers=2", "encoder_attention_heads=4"),
    *("decoder_attention_heads=4", "decoder_ffn_dim=64", "backbone_embed_dim=12", "backbone_depths=[1,1,1,1]"),
    "backbone_num_heads=[1,1,2,2]",
]
FCOS = ["--model", "fcos:test_resnet", "--model-kwargs", "width=32"]
VIDT = ["--model", "vidt_nano", "--model-kwargs", *TINY]


def write_coco(root: Path, train: int = 8, val: int = 4) -> Path:
    """root/{train,val}/N.png and root/annotations/instances_{train,val}.json.

    Image 1 of each split has no box; image 2 also a crowd region and a box without width.
    """
    digits = load_digits()
    random = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir()
        images, annotations = [], []

        def add(image, category, box, crowd=0, annotations=annotations):
            area = {"area": box[2] * box[3], "iscrowd": crowd}
            more = {"image_id": image, "category_id": category, "bbox": box, **area}
            annotations.append({"id": len(annotations) + 1, **more})

        for number in range(count):
            width, height = (64, 48) if number % 2 else (48, 64)
            pixels = random.integers(90, 120, (height, width), dtype=np.uint8)
            for place, category in enumerate(CATEGORIES):
                if number == 1 or random.random() < 0.3:
                    continue
                size = int(random.integers(14, 20))
                digit = Image.fromarray((digits.images[random.integers(100) * 10 + place] * 15.9).astype(np.uint8))
                x, y = int(random.integers(0, width - size)), place * 14 % (height - size)
                pixels[y : y + size, x : x + size] = np.asarray(digit.resize((size, size)))
                add(number, category, [x, y, size, size])
            if number == 2:
                add(number, 3, [0, 0, 30, 30], crowd=1)
                add(number, 7, [5, 5, 0, 9])
                add(number, 7, [5, 30, 15, 12])
            Image.fromarray(pixels).convert("RGB").save(root / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": k, "name": name} for k, name in reversed(CATEGORIES.items())]
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def edited(root: Path, target: Path, split: str, change) -> Path:
    """A copy of the annotations with a change made to one split's; images stay where they are."""
    (target / "annotations").mkdir(parents=True)
    for name in ("train", "val"):
        (target / name).symlink_to(root / name)
        content = json.loads((root / "annotations" / f"instances_{name}.json").read_text())
        if name == split:
            change(content)
        (target / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return target


def common(data: Path, output: Path) -> list[str]:
    """Of each run: four iterations in each of two epochs."""
    texts = f"--data-dir {data} --train-split train --val-split val --img-size 48 --max-size 96 -b 2 --epochs 2"
    return [*texts.split(), *f"--lr 0.001 --workers 0 --device cpu --no-log-tensorboard --output {output}".split()]
