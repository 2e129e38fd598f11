"""A small folder of real images (scikit-learn's 8 x 8 digits), and options for runs of a second on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits


def write_digits(root: Path, train: int = 64, validation: int = 30, classes: int = 10) -> Path:
    """root/{train,validation}/<digit>/<number>.png"""
    digits = load_digits()
    chosen = np.flatnonzero(digits.target < classes)[: train + validation]
    for place, i in enumerate(chosen):
        folder = root / ("train" if place < train else "validation") / str(digits.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((digits.images[i] * 15.9).astype(np.uint8))
        image.resize((32, 32)).convert("RGB").save(folder / f"{i:04}.png")
    return root


def write_teacher(path: Path, classes: int = 10) -> Path:
    torch.manual_seed(1)
    save_file(timm.create_model("test_resnet", num_classes=classes).state_dict(), path)
    return path


def common(data: Path, output: Path) -> list[str]:
    """Of each run: a student of 32 pixels, four iterations in each of two epochs."""
    texts = f"--data-dir {data} --model test_resnet --img-size 32 -b 16 --epochs 2 --warmup-epochs 0 --lr 0.001"
    return [*texts.split(), *f"--workers 0 --device cpu --no-log-tensorboard --output {output}".split()]


def distilling(teacher: Path) -> list[str]:
    return ["--kd-model-name", "test_resnet", "--kd-teacher-path", str(teacher)]
