"""What a result depends on, as short texts: data, files, versions. It is found again by these, or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

#: Up to so many bytes the contents of a data set's files are read; beyond, their sizes and times stand for them.
READ = 256 * 2**20
#: What is read of a teacher's directory.
_WEIGHTS = (".safetensors", ".json", ".yaml", ".bin", ".pt", ".pth")
_INFORMING = ("about.json", "classes.json")


def of_dataset(images: Any) -> str | None:
    """The samples of a data set in their order: names in its folder, labels, and contents.

    Contents are read where all files together have at most 256 MiB: a copy is then the same data. Of larger ones each
    file's size and time of change stand for them: a copy with other times is then other data.

    Args:
        images: of timm or torchvision: numbered samples that are files, or are in memory; or with an `identity()`.

    Returns:
        sha256, or None if it is none of these.
    """
    inner = getattr(images, "images", images)  # of `CheckedImages`
    if callable(own := getattr(inner, "identity", None)):
        return str(own())
    labels = getattr(inner, "targets", getattr(inner, "labels", None))
    if getattr(inner, "data", None) is not None and labels is not None:  # torchvision's CIFAR, MNIST, SVHN
        digest = hashlib.sha256()
        for array in (np.asarray(inner.data), np.asarray(labels)):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()
    owner = getattr(inner, "reader", inner)
    samples = getattr(owner, "samples", None)
    if (
        samples is None
        or not len(samples)
        or not all(_is_named(sample) for sample in samples)
        or not os.path.isfile(samples[0][0])
    ):
        return None
    root = getattr(owner, "root", None) or os.path.commonpath([sample[0] for sample in samples])
    below = os.path.join(root, "")
    names = (p.removeprefix(below) if p.startswith(below) else os.path.relpath(p, root) for p, _ in samples)
    return of_files((path, f"{name} {label}") for (path, label), name in zip(samples, names, strict=True))


def _is_named(sample: Any) -> bool:
    return isinstance(sample, (tuple, list)) and len(sample) == 2 and isinstance(sample[0], str)


def of_path(path: Path) -> str:
    """sha256 of a file's bytes, or of the weights and settings in a directory; "" if there is neither.

    What a run's directory holds for readers alone does not count, as it may be written anew.
    """
    if path.is_file():
        return of_files([(path, "")], read=True)
    files = sorted(file for file in path.glob("*") if _decides(file)) if path.is_dir() else []
    return of_files([(file, file.name) for file in files], read=True) if files else ""


def _decides(file: Path) -> bool:
    return file.suffix in _WEIGHTS and file.name not in _INFORMING


def of_folder(folder: Path) -> str:
    """As `of_dataset`, of all files below a folder, or of one file."""
    if folder.is_file():
        return of_files([(folder, "")])
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return of_files((file, str(file.relative_to(folder))) for file in files)


def of_files(named: Iterable[tuple[str | Path, str]], read: bool = False) -> str:
    """sha256 of names and contents of files, see `of_dataset`.

    Args:
        named: each file, and what it is called.
        read: the contents, whatever their size.
    """
    files = list(named)
    stats = [(stat.st_size, stat.st_mtime_ns) for stat in (os.stat(path) for path, _ in files)]
    read = read or sum(size for size, _ in stats) <= READ
    digest = hashlib.sha256()
    for (path, name), (size, changed) in zip(files, stats, strict=True):
        digest.update(f"{name} {size}\n".encode())
        digest.update(_contents(path) if read else str(changed).encode())
    return digest.hexdigest()


def _contents(path: str | Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.digest()


def versions() -> dict[str, str]:
    """Of what computes the results."""
    import timm
    import torch
    import torchvision

    import dtokd_kernels

    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "dtokd_kernels": dtokd_kernels.__version__,
    }
