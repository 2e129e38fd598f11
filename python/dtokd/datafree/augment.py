"""Small changes of images that were made: shifts and flips, on the images' device, differentiable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """Shifts each image by up to a number of pixels, the border repeated, and flips some.

    Args:
        shift: pixels, in each direction.
        hflip, vflip: probability of a flip from left to right, and of one from top to bottom.
    """

    shift: int = 0
    hflip: float = 0.0
    vflip: float = 0.0

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] of the same size; each has random numbers of its own, of torch's generator."""
        count, _, height, width = images.shape
        device = images.device
        if self.shift:
            wide = F.pad(images, [self.shift] * 4, mode="replicate")
            offsets = torch.randint(0, 2 * self.shift + 1, (2, count, 1), device=device)
            rows, columns = (
                offset + torch.arange(side, device=device)
                for offset, side in zip(offsets, (height, width), strict=True)
            )
            which = torch.arange(count, device=device)[:, None, None]
            # channels last, as indices that are apart move to the front
            images = wide.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        for probability, dim in ((self.hflip, -1), (self.vflip, -2)):
            if probability:
                chosen = torch.rand(count, 1, 1, 1, device=device) < probability
                images = torch.where(chosen, images.flip(dim), images)
        return images
