"""What training makes of boxes, and boxes that are written in another format than COCO's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError

Array = np.ndarray[Any, Any]
#: Of all boxes: where so many are of no use, the file or an option is wrong.
NEARLY_ALL = 0.9
#: Of all boxes: where so many reach beyond their image, and so many can be read as corners, they are corners.
MANY, ALL = 0.2, 0.99


@dataclass(frozen=True)
class Counts:
    """Of a split's boxes.

    Attributes:
        crowds: crowd regions: not learned, and ignored by the evaluation.
        objects: all others, among them:
        degenerate: without width or height; nobody learns from them.
        outside: outside their image; nobody learns from them.
        cut: partly outside by more than a pixel; training takes what is inside.
        repeated: with the class, the image and the numbers of another one.
    """

    crowds: int
    objects: int
    degenerate: int
    outside: int
    cut: int
    repeated: int


def usable(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    """Whether a detector learns from it: no crowd, and a box with an area in the image."""
    x, y, w, h = annotation["bbox"]
    inside = x < image["width"] and y < image["height"] and x + w > 0 and y + h > 0
    return not annotation["iscrowd"] and w > 0 and h > 0 and inside


def count_boxes(annotations: Sequence[dict[str, Any]], images: Sequence[dict[str, Any]]) -> Counts:
    """Count boxes, as `annotations.Annotations` has its content."""
    boxes, sides = _arrays(annotations, images)
    n = len(boxes)
    flat, out, beyond = _useless(boxes, sides)
    different = {(a["image_id"], a["category_id"], *a["bbox"]) for a in annotations if not a["iscrowd"]}
    return Counts(
        crowds=len(annotations) - n,
        objects=n,
        degenerate=int(flat.sum()),
        outside=int(out.sum()),
        cut=int((beyond & ~out).sum()),
        repeated=n - len(different),
    )


def check_boxes(path: Path, annotations: Sequence[dict[str, Any]], images: Sequence[dict[str, Any]]) -> None:
    """Refuse the boxes of a file that are in another format than COCO's.

    Raises:
        UsageError: they are fractions or corners, or nearly none has an area in its image.
    """
    boxes, sides = _arrays(annotations, images)
    n = len(boxes)
    if not n:
        return
    (x, y, w, h), (width, height) = boxes.T, sides.T
    flat, out, beyond = _useless(boxes, sides)
    format = "COCO's bbox is x and y of the upper left corner, width and height, in pixels"
    fractions = ~flat & (boxes.max(1) <= 1) & (sides.min(1) > 1)
    if fractions.mean() >= NEARLY_ALL:
        raise UsageError(
            f"--annotations: {path}: no number of {fractions.sum()} of {n} boxes is above 1, so they are fractions of "
            f"the image; {format}: multiply by the image's width and height"
        )
    corners = (x >= -1) & (y >= -1) & (w >= x) & (h >= y) & (w <= width + 1) & (h <= height + 1)
    if beyond.mean() >= MANY and corners.mean() >= ALL:
        raise UsageError(
            f"--annotations: {path}: {beyond.sum()} of {n} boxes reach beyond their image, and would not if they were "
            f"two corners; {format}: subtract the first corner from the second"
        )
    if flat.sum() + out.sum() >= NEARLY_ALL * n:
        raise UsageError(
            f"--annotations: {path}: {flat.sum()} of {n} boxes have no area and {out.sum()} are outside their image, "
            f"so there is next to nothing to learn from; {format}"
        )


def _useless(boxes: Array, sides: Array) -> tuple[Array, Array, Array]:
    """[n] each: boxes without an area, outside their image, and partly beyond it by more than a pixel."""
    (x, y, w, h), (width, height) = boxes.T, sides.T
    flat = (w <= 0) | (h <= 0)
    out = ~flat & ((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
    beyond = ~flat & ((x + w > width + 1) | (y + h > height + 1) | (x < -1) | (y < -1))
    return flat, out, beyond


def count_small(
    annotations: Sequence[dict[str, Any]],
    images: Sequence[dict[str, Any]],
    resized: Callable[[int, int], tuple[int, int]],
) -> int:
    """Boxes that can be learned, but for less than a pixel of width or height in the resized image.

    Args:
        annotations, images: of `annotations.Annotations`.
        resized: from an image's height and width to what it is resized to.
    """
    boxes, sides = _arrays([a for a in annotations if usable(a, images[a["image_id"]])], images)
    if not len(boxes):
        return 0
    to = {pair: resized(pair[1], pair[0])[::-1] for pair in map(tuple, np.unique(sides, axis=0).astype(int).tolist())}
    scale = np.array([to[tuple(pair)] for pair in sides.astype(int).tolist()]) / sides
    low, high = np.maximum(boxes[:, :2], 0), np.minimum(boxes[:, :2] + boxes[:, 2:], sides)
    return int((((high - low) * scale) < 1).any(1).sum())


def _arrays(annotations: Sequence[dict[str, Any]], images: Sequence[dict[str, Any]]) -> tuple[Array, Array]:
    """Boxes [n, 4] of all that are no crowds, and width and height [n, 2] of their images."""
    kept = [a for a in annotations if not a["iscrowd"]]
    boxes = np.array([a["bbox"] for a in kept], dtype=float).reshape(-1, 4)
    sides = [(images[a["image_id"]]["width"], images[a["image_id"]]["height"]) for a in kept]
    return boxes, np.array(sides, dtype=float).reshape(-1, 2)
