"""Images with boxes: what is there, and what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F

#: Detections below are not drawn.
SURE = 0.3
TRUTH, FOUND = "#15c26b", "#ff8c00"
#: Smaller images are enlarged, so that their shorter side has about as many pixels, and labels can be read.
_SIDE = 384


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
            image = F.to_pil_image((pixels[:, :height, :width].cpu() * 255).round().to(torch.uint8))
            truth = [(box, names[label]) for box, label in zip(*_lists(target, "boxes", "labels"), strict=True)]
            rows = zip(*_lists(detections, "boxes", "labels", "scores"), strict=True)
            sure = [(box, f"{names[label]} {score:.2f}") for box, label, score in rows if score > SURE]
            draw(image, truth, sure).save(path, quality=85)
            written.append(path)
    return written


def _lists(tensors: Mapping[str, Tensor], *names: str) -> list[list[Any]]:
    return [tensors[name].detach().cpu().tolist() for name in names]


def draw_detections(image: Any, detections: Sequence[Mapping[str, Any]]) -> Any:
    """A copy of a Pillow image with what `dtokd predict` has found in it."""
    return draw(image, [], [(found["box"], f"{found['label']} {found['score']:.2f}") for found in detections])


def draw(image: Any, truth: Sequence[tuple[Sequence[float], str]], found: Sequence[tuple[Sequence[float], str]]) -> Any:
    """A copy of a Pillow image, enlarged if it is small, with boxes and their texts.

    Args:
        image: in RGB.
        truth: pairs of a box [x0, y0, x1, y1] in pixels and a text, in green, the text at the bottom.
        found: likewise, in orange, the text at the top.
    """
    scale = max(1, round(_SIDE / min(image.size)))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    line, size = max(2, min(image.size) // 200), max(13, min(image.size) // 28)
    font: Any = ImageFont.load_default(size)
    for pairs, colour, below in ((truth, TRUTH, True), (found, FOUND, False)):
        for box, text in pairs:
            x0, y0, x1, y1 = (value * scale for value in box)
            if x1 <= x0 + 1 or y1 <= y0 + 1:
                continue
            pen.rectangle((x0, y0, x1, y1), outline=colour, width=line)
            _, _, width, height = pen.textbbox((0, 0), text, font=font)
            x = min(max(x0, 0), max(image.width - width - 4, 0))
            y = min(y1, image.height - height - 4) if below else max(y0 - height - 4, 0)
            pen.rectangle((x, y, x + width + 4, y + height + 4), fill=colour)
            pen.text((x + 2, y + 1), text, fill="black", font=font)
    return image
