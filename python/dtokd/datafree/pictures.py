"""Pictures of images that were made."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..files import write_bytes

#: Images in a row, and pixels between them.
_ROW, _GAP = 10, 1


def write_pictures(path: Path, images: Tensor, labels: Tensor) -> None:
    """One picture of several images, sorted by class.

    Args:
        path: of a PNG file; its folder is made.
        images: [n, 1 or 3, height, width] uint8.
        labels: [n], the class of each.

    Raises:
        OSError: the file cannot be written; what was there still is.
    """
    images = images[labels.argsort(stable=True)].cpu()
    count, channels, height, width = images.shape
    rows, columns = -(-count // _ROW), min(count, _ROW)
    sheet = torch.full((channels, rows * (height + _GAP), columns * (width + _GAP)), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // _ROW * (height + _GAP), i % _ROW * (width + _GAP)
        sheet[:, top : top + height, left : left + width] = image
    pixels = sheet.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    write_bytes(path, held.getvalue())
