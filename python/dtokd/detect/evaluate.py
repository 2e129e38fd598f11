"""COCO's average precision, by pycocotools, and the split of the errors."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
from torch import Tensor

from .annotations import Annotations
from .batch import Detections, Target
from .data import index
from .errors import split_errors
from .options import METRICS


class CocoEvaluator:
    """Collects detections of a split, then judges them; timm's evaluators have the same two methods.

    Args:
        annotations: of the split.
    """

    def __init__(self, annotations: Annotations) -> None:
        self._truth = index(annotations.content)
        self._numbers = {image: number for number, image in enumerate(annotations.image_ids)}
        self._rows: list[np.ndarray[Any, Any]] = []
        self._seen: set[int | str] = set()
        self._per_class: list[float | None] = []

    def update(self, detections: Detections, targets: list[Target]) -> None:
        """Boxes go back to the pixels of the files. An image that comes twice counts once.

        Args:
            detections: of a batch.
            targets: of its images: the file's "image_id", "size" and "original".
        """
        for found, target in zip(detections.images, targets, strict=True):
            if target["image_id"] in self._seen:
                continue
            self._seen.add(target["image_id"])
            (h, w), (height, width) = target["size"], target["original"]
            boxes = _numbers(found["boxes"]) * np.array([width / w, height / h] * 2)
            boxes[:, 2:] -= boxes[:, :2]
            image = np.full(len(boxes), self._numbers[target["image_id"]])
            rows = np.column_stack([image, boxes, _numbers(found["scores"]), _numbers(found["labels"])])
            self._rows.append(rows[np.isfinite(rows).all(1)])  # a box or a score of NaN finds nothing

    def compute(self) -> dict[str, float]:
        """AP in [0, 1], as COCO prints it, -1 as NaN where there is nothing of that size; see `split_errors` too."""
        rows = np.concatenate(self._rows) if self._rows else np.zeros((0, 7))
        errors = {f"error_{name}": value for name, value in split_errors(self._truth, rows).items()}
        if not len(rows):
            return dict.fromkeys(METRICS, 0.0) | errors
        from pycocotools.cocoeval import COCOeval

        with redirect_stdout(StringIO()):
            judged = COCOeval(self._truth, self._truth.loadRes(rows), "bbox")
            judged.evaluate()
            judged.accumulate()
            judged.summarize()
        precision = judged.eval["precision"][:, :, :, 0, -1]  # [thresholds, recalls, classes] of all sizes
        self._per_class = [float(p[p > -1].mean()) if (p > -1).any() else None for p in np.moveaxis(precision, 2, 0)]
        values = {name: float(v) for name, v in zip(METRICS, judged.stats, strict=False)}
        return {name: v if v >= 0 else float("nan") for name, v in values.items()} | errors

    def details(self) -> dict[str, Any]:
        """For `classes.json`: AP in [0, 1] and objects of each class, in the order of the labels; after `compute`."""
        categories = sorted(self._truth.getCatIds())
        objects = [len(self._truth.getAnnIds(catIds=[category], iscrowd=False)) for category in categories]
        return {"ap": self._per_class or [0.0 if count else None for count in objects], "objects": objects}


def _numbers(x: Tensor) -> np.ndarray[Any, Any]:
    return x.detach().cpu().double().numpy()
