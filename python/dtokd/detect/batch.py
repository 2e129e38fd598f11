"""What detectors take and give: padded images, targets, detections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

#: One image's: "boxes" [n, 4] x0 y0 x1 y1 in pixels of the resized image, "labels" [n] int64 from 0, and for the
#: evaluation "image_id", "size" (height, width of the resized image), "original" (of the file's).
Target = dict[str, Any]

#: Height and width of a batch are multiples of it, as backbones of stride 32 like them.
MULTIPLE = 32


def padded(size: int) -> int:
    """A side with its padding, where no other image of the batch is larger."""
    return -(-size // MULTIPLE) * MULTIPLE


@dataclass
class Images:
    """Images of one batch, padded at the right and below to one size.

    Attributes:
        pixels: [B, 3, H, W] in [0, 1], 0 where padded.
        mask: [B, H, W] bool, False where padded.
        sizes: height and width of each without padding.
    """

    pixels: Tensor
    mask: Tensor
    sizes: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.pixels)

    def alike(self) -> Iterator[tuple[list[int], Images]]:
        """Parts of the batch, with their numbers in it, in which each image is padded as it would be alone."""
        numbers: dict[tuple[int, int], list[int]] = {}
        for number, (height, width) in enumerate(self.sizes):
            numbers.setdefault((padded(height), padded(width)), []).append(number)
        for (height, width), part in numbers.items():
            all_of_it = len(part) == len(self)
            pixels, mask = (self.pixels, self.mask) if all_of_it else (self.pixels[part], self.mask[part])
            sizes = [self.sizes[number] for number in part]
            yield part, Images(pixels[..., :height, :width], mask[..., :height, :width], sizes)

    def filled(self, color: Sequence[float]) -> Tensor:
        """The pixels [B, 3, H, W], of this color [3] where padded."""
        return torch.where(self.mask[:, None], self.pixels, self.pixels.new_tensor(color).view(1, -1, 1, 1))

    def to(self, device: torch.device) -> Images:
        """On a device."""
        return replace(
            self, pixels=self.pixels.to(device, non_blocking=True), mask=self.mask.to(device, non_blocking=True)
        )

    def contiguous(self, memory_format: torch.memory_format) -> Images:
        """In another memory format."""
        return replace(self, pixels=self.pixels.contiguous(memory_format=memory_format))

    def pin_memory(self) -> Images:
        """For `torch.utils.data.DataLoader`."""
        return replace(self, pixels=self.pixels.pin_memory(), mask=self.mask.pin_memory())


def blank(side: int, device: torch.device) -> Images:
    """One black image, square, with its padding."""
    whole = padded(side)
    mask = torch.zeros(1, whole, whole, dtype=torch.bool, device=device)
    mask[:, :side, :side] = True
    return Images(torch.zeros(1, 3, whole, whole, device=device), mask, [(side, side)])


@dataclass
class Detections:
    """Of one batch: per image "boxes" [n, 4] as in `Target`, "scores" [n], falling, and "labels" [n]."""

    images: list[dict[str, Tensor]]
