"""COCO's average precision, by pycocotools, and the split of the errors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
from torch import Tensor

from ..train.world import World
from .annotations import Annotations
from .batch import Detections, Target
from .data import index
from .errors import split_errors
from .options import METRICS

#: Detections by the image's number.
_Rows = dict[int, np.ndarray[Any, Any]]


class CocoEvaluator:
    """Collects detections of a split, then judges them; timm's evaluators have the same two methods.

    Args:
        annotations: of the split.
        world: the processes that each judge a part of it; default: this one alone.
    """

    def __init__(self, annotations: Annotations, world: World | None = None) -> None:
        self._truth, self._world = index(annotations.content), world or World()
        self._numbers = {image: number for number, image in enumerate(annotations.image_ids)}
        self._rows: _Rows = {}
        self._per_class: list[float | None] = []

    def update(self, detections: Detections, targets: list[Target]) -> None:
        """Boxes go back to the pixels of the files. An image that comes twice counts once.

        Args:
            detections: of a batch.
            targets: of its images: the file's "image_id", "size" and "original".
        """
        for found, target in zip(detections.images, targets, strict=True):
            number = self._numbers[target["image_id"]]
            if number in self._rows:
                continue
            (h, w), (height, width) = target["size"], target["original"]
            boxes = _numbers(found["boxes"]) * np.array([width / w, height / h] * 2)
            boxes[:, 2:] -= boxes[:, :2]
            image = np.full(len(boxes), number)
            rows = np.column_stack([image, boxes, _numbers(found["scores"]), _numbers(found["labels"])])
            self._rows[number] = rows[np.isfinite(rows).all(1)]  # a box or a score of NaN finds nothing

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """AP in [0, 1], as COCO prints it, -1 as NaN where there is nothing of that size; see `split_errors` too.

        Args:
            distributed: judge what all processes have collected, on the first one; all call it, and all get its
                numbers.
        """
        if not distributed:
            return self._judge([self._rows])
        parts = self._world.gather(self._rows)
        return self._world.shared(self._judge(parts) if parts else {})

    def average_precision(self, metric: str = METRICS[0]) -> float:
        """One of `METRICS`, of what was collected here."""
        return self._metrics(self._in_order([self._rows]))[metric]

    def _judge(self, parts: Sequence[_Rows]) -> dict[str, float]:
        """Metrics and errors."""
        rows = self._in_order(parts)
        errors = {f"error_{name}": value for name, value in split_errors(self._truth, rows).items()}
        return self._metrics(rows) | errors

    @staticmethod
    def _in_order(parts: Sequence[_Rows]) -> np.ndarray[Any, Any]:
        """Rows in the order of the images, whoever has seen them."""
        found = {number: rows for part in reversed(parts) for number, rows in part.items()}
        return np.concatenate([found[number] for number in sorted(found)]) if found else np.zeros((0, 7))

    def _metrics(self, rows: np.ndarray[Any, Any]) -> dict[str, float]:
        from pycocotools.cocoeval import COCOeval

        with redirect_stdout(StringIO()):
            # pycocotools loads no empty list
            found = self._truth.loadRes(rows) if len(rows) else index({**self._truth.dataset, "annotations": []})
            judged = COCOeval(self._truth, found, "bbox")
            judged.evaluate()
            judged.accumulate()
            judged.summarize()
        precision = judged.eval["precision"][:, :, :, 0, -1]  # [thresholds, recalls, classes] of all sizes
        self._per_class = [float(p[p > -1].mean()) if (p > -1).any() else None for p in np.moveaxis(precision, 2, 0)]
        values = {name: float(v) for name, v in zip(METRICS, judged.stats, strict=False)}
        return {name: v if v >= 0 else float("nan") for name, v in values.items()}

    def details(self) -> dict[str, Any]:
        """For `classes.json`: AP in [0, 1] and objects of each class, in the order of the labels; after `compute`."""
        categories = sorted(self._truth.getCatIds())
        objects = [len(self._truth.getAnnIds(catIds=[category], iscrowd=False)) for category in categories]
        return {"ap": self._per_class, "objects": objects}


def _numbers(x: Tensor) -> np.ndarray[Any, Any]:
    return x.detach().cpu().double().numpy()
