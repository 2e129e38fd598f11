"""COCO's annotation file: read, checked before training starts, categories counted from 0."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError


@dataclass(frozen=True)
class Annotations:
    """A split's annotation file.

    Attributes:
        path: the file.
        content: as it is, for the evaluator.
        categories: name by id, in the order of the ids; a label is the position in it.
        degenerate: boxes without area, which nobody learns from.
        crowds: crowd regions: not learned, and ignored by the evaluation.
        empty: images without a box.
        most: objects of the fullest image.
    """

    path: Path
    content: dict[str, Any]
    categories: dict[int, str]
    degenerate: int
    crowds: int
    empty: int
    most: int

    @property
    def label_of(self) -> dict[int, int]:
        """From category id to label."""
        return {category: label for label, category in enumerate(self.categories)}


def usable(annotation: dict[str, Any]) -> bool:
    """Whether a detector learns from it: no crowd, and a box with an area."""
    return not annotation.get("iscrowd") and annotation["bbox"][2] > 0 and annotation["bbox"][3] > 0


def read_annotations(path: Path, images: Path) -> Annotations:
    """Read and check one split.

    Args:
        path: the JSON file.
        images: the folder that holds its images.

    Raises:
        UsageError: no such file, not COCO's format, an image that is not there, or an annotation of an image or a
            category that the file does not know.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--annotations: {path} cannot be read: {error.strerror}; see --data-dir too") from error
    except ValueError as error:
        raise UsageError(f"--annotations: {path} is no JSON: {error}") from error
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise UsageError(f"--annotations: {path} has no lists images, annotations and categories, as COCO's files have")
    try:
        return _checked(path, content, images)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--annotations: {path}: an entry of images, annotations or categories is not as COCO has it: "
            f"{type(error).__name__} {error}"
        ) from error


def _checked(path: Path, content: dict[str, Any], folder: Path) -> Annotations:
    files = {image["id"]: image["file_name"] for image in content["images"]}
    if len(files) != len(content["images"]):
        raise UsageError(f"--annotations: {path} has several images of one id")
    sizes = [(image["width"], image["height"]) for image in content["images"]]
    if not all(isinstance(number, int) for number in (*files, *(n for size in sizes for n in size))):
        raise UsageError(f"--annotations: {path}: ids, widths and heights of images must be whole numbers")
    if not files:
        raise UsageError(f"--annotations: {path} has no images")
    # one look at each folder, not one at each file
    there = {str(p) for p in {(folder / name).parent for name in files.values()}}
    held = {str(p) for parent in there if Path(parent).is_dir() for p in Path(parent).iterdir()}
    missing = [name for name in files.values() if str(folder / name) not in held]
    if missing:
        raise UsageError(
            f"--data-dir: {len(missing)} of {len(files)} images of {path} are not in {folder}, the first is "
            f"{missing[0]}; restore them, remove them from the file, or name the folder with --train-split, --val-split"
        )
    categories = {int(c["id"]): str(c["name"]) for c in sorted(content["categories"], key=lambda c: c["id"])}
    if not categories or len(categories) != len(content["categories"]):
        raise UsageError(f"--annotations: {path} has no categories, or several of one id")
    counts = dict.fromkeys(files, 0)
    degenerate = crowds = 0
    for a in content["annotations"]:
        if a["image_id"] not in files:
            raise UsageError(
                f"--annotations: {path}: annotation {a['id']} is of image {a['image_id']}, which the file does not list"
            )
        if a["category_id"] not in categories:
            raise UsageError(
                f"--annotations: {path}: annotation {a['id']} is of category {a['category_id']}, which the file does "
                "not list"
            )
        if len(a["bbox"]) != 4:
            raise UsageError(f"--annotations: {path}: annotation {a['id']} has no bbox of x, y, width, height")
        if usable(a):
            counts[a["image_id"]] += 1
        elif a.get("iscrowd"):
            crowds += 1
        else:
            degenerate += 1
    # COCO's evaluator reads both; some tools leave them out
    for a in content["annotations"]:
        a.setdefault("iscrowd", 0)
        a.setdefault("area", a["bbox"][2] * a["bbox"][3])
    empty = sum(not n for n in counts.values())
    if empty == len(counts):
        raise UsageError(f"--annotations: {path} has no box to learn from or to judge by")
    return Annotations(path, content, categories, degenerate, crowds, empty, max(counts.values()))
