"""Detectors on images that are never trained on, see `dtokd.train.heldout`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..objectives.task import DistillationTask
from ..train.heldout import Judges, frozen_statistics, positions
from ..train.world import World
from .annotations import Annotations
from .batch import Images, Target
from .evaluate import CocoEvaluator


def split(options: argparse.Namespace, train: Annotations, world: World) -> tuple[Annotations, Annotations | None]:
    """The images that are trained on, and those of them that are held out, the same in each run.

    Args:
        options: of `detect.options`.
        train: of the training split.
        world: the processes that train together; each looks at a part.

    Raises:
        UsageError: too few are held out, or they have no box.
    """
    if not options.kd_held_out:
        return train, None
    shown: list[set[int]] = [set() for _ in train.image_ids]
    for a in train.content["annotations"]:
        shown[a["image_id"]].add(a["category_id"])
    trained, held = (train.part(numbers) for numbers in positions(options.kd_held_out, len(shown), shown))
    count = len(held.image_ids)
    if count < world.size or held.empty == count:
        lacking = f"fewer than the {world.size} processes" if count < world.size else "and they have no box"
        raise UsageError(f"--kd-held-out: {options.kd_held_out:g} of the images are {count}, {lacking}; hold out more")
    return trained, held


class Detectors(Judges):
    """A detector's own loss, and 1 - AP on the images of the batch, which waits for the device.

    Args:
        task: holds the student and its teachers.
        names: of the classes, in the order of the labels.
        annotations: of the held-out images.
        metric: of `options.METRICS`: what AP is.
    """

    def __init__(self, task: DistillationTask, names: Sequence[str], annotations: Annotations, metric: str) -> None:
        super().__init__(task, names)
        self._annotations, self._metric = annotations, metric
        self._numbers = {image: number for number, image in enumerate(annotations.image_ids)}

    def loss(self, images: Images, target: list[Target]) -> Tensor:
        """See `Judges`."""
        with frozen_statistics(self.student):
            loss = self.student.observe(images, target).loss
        assert isinstance(loss, Tensor)
        return loss.float()

    def errors(self, images: Images, target: list[Target]) -> Tensor:
        """See `Judges`; NaN where none of the images has a box of the metric's kind."""
        part = self._annotations.part([self._numbers[t["image_id"]] for t in target])
        training = self.student.training
        models = [self.student.eval(), *self.teachers]
        precisions = [_precision(model, images, target, part, self._metric) for model in models]
        self.student.train(training)
        return 1 - torch.tensor(precisions, dtype=torch.float64, device=images.pixels.device)


def _precision(model: nn.Module, images: Images, target: list[Target], part: Annotations, metric: str) -> float:
    evaluator = CocoEvaluator(part)
    evaluator.update(model(images), target)
    return evaluator.average_precision(metric)
