"""Students that find objects: scenes of real digits on photographs, as `dtokd detect --demo` has them.

A dense detector (FCOS) on ImageNet's MobileNetV2 teaches one on a small ResNet, by its feature maps and by its
predictions. Scenes are not distorted, so the teacher looks at each of them once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from dtokd.detect.annotations import Annotations, read_annotations
from dtokd.detect.batch import Images
from dtokd.detect.demo import imagenet_weights
from dtokd.detect.detectors.dense import Dense, make_backbone
from dtokd.detect.evaluate import CocoEvaluator
from dtokd.detect.scenes import Scenes, write_scenes
from dtokd.objectives.detection import Predictions
from dtokd.objectives.features import MultiScale
from dtokd.objectives.taps import Outputs, Taps
from dtokd.objectives.task import Trainable
from dtokd.train.heldout import frozen_statistics
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.transforms.functional import pil_to_tensor

from ..digits import WEIGHT_DECAY, seeded
from .pupil import Pupil

SCENES = Scenes(train=600, val=600)
#: Of the second part's scenes: what is chosen on; the others are for testing.
VALIDATION = 200
BATCH, LOOK = 8, 32
CLASSES, LEVELS, TEACHER_WIDTH, STUDENT_WIDTH = len(SCENES.digits), (0, 1, 2, 3, 4), 64, 32
TEACHER_BATCH, TEACHER_ITERATIONS, TEACHER_LR = 16, 500, 2e-3
#: What is judged: of so small and so few scenes it is less noisy than AP.
METRIC = "ap50"


@dataclass
class Part:
    """Some scenes.

    Attributes:
        annotations: of these alone.
        pixels: [N, 3, size, size] in [0, 1].
    """

    annotations: Annotations
    pixels: Tensor

    def batch(self, index: Tensor) -> tuple[Images, list[dict[str, Any]]]:
        """Images and targets, as a detector takes them."""
        side = SCENES.size
        mask = torch.ones(len(index), side, side, dtype=torch.bool)
        return Images(self.pixels[index], mask, [(side, side)] * len(index)), [self._targets[int(i)] for i in index]

    @cached_property
    def _targets(self) -> list[dict[str, Any]]:
        size = (SCENES.size, SCENES.size)
        found: list[dict[str, Any]] = []
        for image in self.annotations.content["images"]:
            objects = [a for a in self.annotations.content["annotations"] if a["image_id"] == image["id"]]
            boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            labels = torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)
            told = {"image_id": self.annotations.image_ids[image["id"]], "size": size, "original": size}
            found.append({"boxes": boxes, "labels": labels, **told})
        return found

    @torch.no_grad()
    def score(self, detector: Dense, index: Tensor | None = None) -> float:
        """`METRIC` of a detector on these scenes, or on some of them. Leaves it in evaluation mode."""
        numbers = torch.arange(len(self.pixels)) if index is None else index.unique()
        evaluator = CocoEvaluator(self.annotations.part(numbers.tolist()))
        detector.eval()
        for part in numbers.split(100):
            images, targets = self.batch(part)
            evaluator.update(detector(images), targets)
        return evaluator.average_precision(METRIC)


@dataclass
class SceneSet:
    """The scenes as the students see them.

    Attributes:
        train, validation, test: they share no digit and no photograph with `train`.
        taught: the teacher's outputs for the training scenes.
        teacher_accuracy, teacher_validation: its score on the test and on the validation scenes.
    """

    train: Part
    validation: Part
    test: Part
    taught: Outputs
    teacher_accuracy: float
    teacher_validation: float


def load(folder: Path) -> SceneSet:
    """Write the scenes and train the teacher where that was not done before, in a folder, and read both."""
    root, weights = folder / "scenes", folder / "scenes, teacher.safetensors"
    if not (root / "annotations" / "instances_val.json").exists():
        write_scenes(root, SCENES)
    train, judged = (_read(root, split) for split in ("train", "val"))
    parts = [range(VALIDATION), range(VALIDATION, SCENES.val)]
    validation, test = (Part(judged.annotations.part(list(part)), judged.pixels[list(part)]) for part in parts)
    with seeded(0):
        teacher = Dense("fcos", make_backbone("mobilenetv2_100", {}, None), CLASSES, width=TEACHER_WIDTH)
    if not weights.exists():
        own = teacher.net.backbone.body
        kept = {name: value for name, value in imagenet_weights().items() if name in own.state_dict()}
        own.load_state_dict({**own.state_dict(), **kept})
        _train(teacher, train)
        save_file(teacher.state_dict(), weights)
    teacher.load_state_dict(load_file(weights))
    return SceneSet(train, validation, test, _outputs(teacher, train), test.score(teacher), validation.score(teacher))


def _read(root: Path, split: str) -> Part:
    annotations = read_annotations(root / "annotations" / f"instances_{split}.json", root / split)
    images = [Image.open(root / split / image["file_name"]) for image in annotations.content["images"]]
    return Part(annotations, torch.stack([pil_to_tensor(image) for image in images]).float() / 255)


def _train(teacher: Dense, scenes: Part) -> None:
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=TEACHER_LR, weight_decay=WEIGHT_DECAY)
    schedule = OneCycleLR(optimizer, TEACHER_LR, total_steps=TEACHER_ITERATIONS, cycle_momentum=False)
    generator = torch.Generator().manual_seed(0)
    teacher.train()
    for _ in range(TEACHER_ITERATIONS):
        loss = teacher.observe(*scenes.batch(torch.randint(SCENES.train, (TEACHER_BATCH,), generator=generator))).loss
        assert loss is not None
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _outputs(teacher: Dense, scenes: Part) -> Outputs:
    parts = [teacher.eval().observe(scenes.batch(index)[0]) for index in torch.arange(len(scenes.pixels)).split(100)]
    fields = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "boxes", "quality")}
    return Outputs(**fields, maps=tuple(torch.cat(maps) for maps in zip(*(part.maps for part in parts), strict=True)))


class Detecting(Pupil):
    """A new detector, drawn from torch's random numbers.

    Args:
        data: what it learns.
        objective: "" without a teacher; anything else for features and predictions.
    """

    batch = BATCH

    def __init__(self, data: SceneSet, objective: str) -> None:
        self.student = Dense("fcos", make_backbone("test_resnet", {}, None), CLASSES, width=STUDENT_WIDTH)
        widths = [STUDENT_WIDTH] * len(LEVELS), [TEACHER_WIDTH] * len(LEVELS)
        features = MultiScale("features", "linear", (LEVELS, LEVELS), widths, "standardize", "mse")
        self.lessons = [features, Predictions("predictions", True, torch.arange(CLASSES))] if objective else []
        heads = {lesson.name: lesson.head for lesson in self.lessons if lesson.head is not None}
        self.trained = Trainable(self.student, heads, Taps(logits=True, stages=LEVELS))
        self._data, self.images = data, len(data.train.pixels)
        self.teacher_error = 1 - data.teacher_validation

    def losses(self, index: Tensor) -> dict[str, Tensor]:
        """See `Pupil`."""
        self.trained.train()
        images, targets = self._data.train.batch(index)
        outputs, projected = self.trained(images, targets)
        losses = {"task": outputs.loss}
        taught = self._data.taught.each(lambda x: x[index])
        for lesson in self.lessons:
            losses[lesson.name] = lesson.loss(outputs, projected.get(lesson.name), taught, targets)
        return losses

    def held_out_loss(self, generator: Generator) -> Tensor:
        """See `Pupil`."""
        images, targets = self._data.validation.batch(self._look(generator)[:BATCH])
        with frozen_statistics(self.student):
            loss = self.student.observe(images, targets).loss
        assert loss is not None
        return loss

    def error(self, generator: Generator) -> Tensor:
        """See `Pupil`."""
        return torch.tensor(1 - self._data.validation.score(self.student, self._look(generator)), dtype=torch.float64)

    def _look(self, generator: Generator) -> Tensor:
        return torch.randperm(len(self._data.validation.pixels), generator=generator)[:LOOK]

    def score(self, part: str) -> float:
        """`METRIC`."""
        scenes: Part = getattr(self._data, part)
        return scenes.score(self.student)
