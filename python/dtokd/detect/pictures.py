"""Validation images with boxes: what is there, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes

#: Detections below are not drawn.
SURE = 0.3
TRUTH, FOUND = "#15c26b", "#ff8c00"
#: Small images are enlarged to about this height, so that labels can be read.
_HEIGHT = 256


@torch.no_grad()
def draw_pictures(folder: Path, detector: Any, loader: Any, names: Sequence[str], count: int) -> list[Path]:
    """Write the first images of a loader, objects in green and detections above 0.3 in orange.

    Args:
        folder: where to; files are named by image id, older ones go.
        detector: images to `batch.Detections`; left in evaluation mode.
        loader: of (Images, targets).
        names: of the classes.
        count: how many images.

    Returns:
        The files.
    """
    detector.eval()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.jpg"):
        old.unlink()
    written: list[Path] = []
    for images, targets in loader:
        found = detector(images).images
        for pixels, target, detections in zip(images.pixels, targets, found, strict=True):
            if len(written) == count:
                return written
            height, width = target["size"]
            path = folder / f"{quote(str(target['image_id']), safe='')}.jpg"
            image = _draw(pixels[:, :height, :width].cpu(), target, detections, names)
            F.to_pil_image(image).save(path, quality=85)
            written.append(path)
    return written


def _draw(pixels: Tensor, target: dict[str, Any], found: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    scale = max(1, round(_HEIGHT / pixels.shape[1]))
    image = (pixels * 255).round().to(torch.uint8)
    image = F.resize(image, [pixels.shape[1] * scale, pixels.shape[2] * scale], antialias=True)
    sure = found["scores"] > SURE
    labels = [f"{names[c]} {s:.2f}" for c, s in zip(found["labels"][sure].tolist(), found["scores"][sure], strict=True)]
    for boxes, colour, text in ((target["boxes"], TRUTH, None), (found["boxes"][sure], FOUND, labels)):
        boxes = boxes.detach().cpu() * scale
        kept = (boxes[:, 2:] > boxes[:, :2] + 1).all(1)
        if kept.any():
            text = None if text is None else [t for t, k in zip(text, kept.tolist(), strict=True) if k]
            image = draw_bounding_boxes(image, boxes[kept], labels=text, colors=colour, width=2)
    return image
