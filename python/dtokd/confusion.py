"""Which classes a classifier takes for which, counted beside timm's metrics."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.task import ClassificationEvaluator
from torch import Tensor

#: Beyond so many classes nothing is counted: the matrix has their square, in 8 bytes each.
MOST = 4096
#: Up to so many classes a report shows the whole matrix.
SHOWN = 30
#: Pairs of classes that are most often confused, which are kept of a larger matrix.
PAIRS = 50


class ConfusionEvaluator(ClassificationEvaluator):
    """timm's evaluator, with a matrix of counts; nothing waits for the device.

    Attributes:
        matrix: [classes, classes] int64, of true (rows) and predicted classes; None before the first batch, and for
            more than 4096 classes. After `compute` it is that of all ranks.
    """

    matrix: Tensor | None

    def reset(self) -> None:
        """Forget all."""
        super().reset()
        self.matrix = None

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor) -> None:
        """Of logits [B, classes] and labels [B]."""
        seen = self.num_samples
        super().update(output, target)
        count, classes = self.num_samples - seen, output.shape[1]
        if classes > MOST:
            return
        if self.matrix is None:
            self.matrix = torch.zeros(classes, classes, dtype=torch.int64, device=output.device)
        # as timm counts what is right
        predicted = output[:count].detach().float().topk(1, dim=-1).indices[:, 0]
        self.matrix.index_put_((target[:count], predicted), torch.ones_like(predicted), accumulate=True)

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """Timm's metrics: loss, top1, top5."""
        if distributed and self.matrix is not None:
            dist.all_reduce(self.matrix)
        return dict(super().compute(distributed=distributed))

    @property
    def chance(self) -> float:
        """Percent right of always naming the class that is most frequent; NaN where nothing was counted."""
        if self.matrix is None or not int(self.matrix.sum()):
            return float("nan")
        return 100 * float(self.matrix.sum(1).max()) / float(self.matrix.sum())

    def details(self) -> dict[str, Any]:
        """For `classes.json`: images and percent right of each class, and the matrix or its largest other entries."""
        if self.matrix is None:
            return {}
        matrix = self.matrix.cpu()
        images, right = matrix.sum(1), matrix.diagonal()
        told: dict[str, Any] = {
            "images": images.tolist(),
            "accuracy": [100 * r / n if n else None for r, n in zip(right.tolist(), images.tolist(), strict=True)],
        }
        if len(matrix) <= SHOWN:
            return {**told, "matrix": matrix.tolist()}
        wrong = matrix - torch.diag(right)
        counts, places = wrong.flatten().topk(min(PAIRS, wrong.numel()))
        pairs = [
            [place // len(matrix), place % len(matrix), count]
            for place, count in zip(places.tolist(), counts.tolist(), strict=True)
            if count
        ]
        return {**told, "confused": pairs}
