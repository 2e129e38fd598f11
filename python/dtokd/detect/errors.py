"""What keeps a detector from perfect AP50: classification, localisation, and the rest.

Source: Bolya et al., *TIDE: A General Toolbox for Identifying Object Detection Errors*, ECCV 2020; the paper's Fig. 4
shows the first two. Its package is not kept up, so the definitions (their Sec. 2) stand here, on pycocotools' IoU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from .detectors.base import MOST

#: A detection is right above the first, and about an object above the second.
FOREGROUND, BACKGROUND = 0.5, 0.1
KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
Array = np.ndarray[Any, Any]


def split_errors(truth: Any, rows: Array) -> dict[str, float]:
    """How much AP50 would rise if one kind of error were set right, by kind.

    An error of class gets the right one, of place the right box, unless the object is found already: then it goes; the
    others go; missed objects are not asked for.

    Args:
        truth: pycocotools' COCO.
        rows: [N, 7] image id, x, y, width, height, score, category id, in pixels of the files.

    Returns:
        In points of AP50 in [0, 1], for each of `KINDS`.
    """
    pairs = _Matched(truth)
    by_image = {image: rows[rows[:, 0] == image] for image in np.unique(rows[:, 0])}
    for image in sorted(truth.imgs):
        pairs.add(image, by_image.get(image, rows[:0]))
    base = pairs.ap50()
    return {kind: pairs.ap50(fixed=kind) - base for kind in KINDS}


class _Matched:
    """Detections of all images with what is wrong with each."""

    def __init__(self, truth: Any) -> None:
        self._truth = truth
        #: (score, category, kind or "" if right, category and number of the object that it would be)
        self._found: list[tuple[float, int, str, tuple[int, int] | None]] = []
        self._objects: dict[int, int] = defaultdict(int)
        self._missed: dict[int, int] = defaultdict(int)

    def add(self, image: int, rows: Array) -> None:
        """Match one image's detections as COCO does at IoU 0.5, and name the errors."""
        from pycocotools import mask

        annotations = self._truth.imgToAnns.get(image, [])
        objects = [a for a in annotations if not a["iscrowd"]]
        crowds = [a for a in annotations if a["iscrowd"]]
        rows = rows[np.argsort(-rows[:, 5], kind="mergesort")][:MOST]
        boxes = np.ascontiguousarray(rows[:, 1:5])

        def overlap(others: list[dict[str, Any]], crowd: int) -> Array:
            if not len(rows) or not others:
                return np.zeros((len(rows), len(others)))
            found: Array = mask.iou(boxes, np.array([a["bbox"] for a in others], dtype=float), [crowd] * len(others))
            return found

        iou, in_crowd = overlap(objects, 0), overlap(crowds, 1)
        classes = np.array([a["category_id"] for a in objects], dtype=int)
        taken = np.zeros(len(objects), dtype=bool)
        right = np.full(len(rows), -1)
        for d, row in enumerate(rows):
            able = np.where((classes == row[6]) & ~taken, iou[d], 0.0) if len(objects) else np.zeros(0)
            if able.size and able.max() >= FOREGROUND:
                right[d] = int(able.argmax())
                taken[right[d]] = True
        covered = taken.copy()
        for d, row in enumerate(rows):
            category, score = int(row[6]), float(row[5])
            if right[d] >= 0:
                self._found.append((score, category, "", None))
                continue
            if any(c["category_id"] == category and in_crowd[d, k] >= FOREGROUND for k, c in enumerate(crowds)):
                continue
            kind, target = _name(iou[d], classes == category, taken)
            if target is not None:
                covered[target] = True
            key = None if target is None or taken[target] else (int(classes[target]), int(objects[target]["id"]))
            self._found.append((score, category, kind, key))
        for a, done in zip(objects, covered, strict=True):
            self._objects[a["category_id"]] += 1
            self._missed[a["category_id"]] += not done

    def ap50(self, fixed: str | None = None) -> float:
        """Mean over the categories that occur."""
        scored: dict[int, list[tuple[float, bool]]] = defaultdict(list)
        done: set[tuple[int, int]] = set()
        for score, category, kind, key in sorted(self._found, key=lambda f: -f[0]):
            if kind == fixed and kind:
                # set right once per object; what is left over goes
                if key is not None and key not in done:
                    done.add(key)
                    scored[key[0]].append((score, True))
                continue
            scored[category].append((score, not kind))
        objects: Mapping[int, int] = self._objects
        if fixed == "missed":
            objects = {c: n - self._missed[c] for c, n in objects.items()}
        values = [_average_precision(scored[c], n) for c, n in objects.items() if n]
        return float(np.mean(values)) if values else 0.0


def _name(iou: Array, same: Array, taken: Array) -> tuple[str, int | None]:
    """The kind of a wrong detection, and the object it was meant for."""
    if not iou.size:
        return "background", None
    own = np.where(same, iou, 0.0)
    other = np.where(same, 0.0, iou)
    if BACKGROUND <= own.max() < FOREGROUND:
        return "localisation", int(own.argmax())
    if other.max() >= FOREGROUND:
        return "classification", int(other.argmax())
    if own.max() >= FOREGROUND and taken[own.argmax()]:
        return "duplicate", None
    if iou.max() <= BACKGROUND:
        return "background", None
    return "both", None


def _average_precision(scored: list[tuple[float, bool]], objects: int) -> float:
    """COCO's: precision made falling, read at 101 recalls."""
    if not scored:
        return 0.0
    order = sorted(scored, key=lambda s: -s[0])
    right = np.cumsum([r for _, r in order])
    recall, precision = right / objects, right / np.arange(1, len(order) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    return float(np.mean([precision[p] if p < len(precision) else 0.0 for p in places]))
