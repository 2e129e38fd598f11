"""A network that makes images from random codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: The sides of an image must be multiples of it: the generator doubles them twice.
MULTIPLE = 4


class Generator(nn.Module):
    """Codes to images: a linear layer to maps of a quarter of the size, which are doubled twice between convolutions.

    Source: DCGAN (Radford et al., ICLR 2016) in the form of Fast-DFKD (Fang et al., AAAI 2022): nearest neighbours and
    3 x 3 convolutions instead of transposed ones.

    Args:
        size: channels, height and width of the images; height and width are multiples of 4.
        latent: numbers in a code.
        width: channels of the last hidden layer; the ones before it have twice as many.

    Raises:
        ValueError: a side is no multiple of 4.
    """

    def __init__(self, size: tuple[int, int, int], latent: int = 256, width: int = 64) -> None:
        super().__init__()
        channels, *sides = size
        if any(side % MULTIPLE or side < MULTIPLE for side in sides):
            raise ValueError(
                f"Generator: images of {sides[0]} x {sides[1]}; pass sides that are multiples of {MULTIPLE}"
            )
        self.latent = latent
        self._first = (2 * width, sides[0] // MULTIPLE, sides[1] // MULTIPLE)
        self.linear = nn.Linear(latent, self._first[0] * self._first[1] * self._first[2])
        self.norm = nn.BatchNorm2d(2 * width)
        self.middle = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2)
        )
        self.last = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)
        )
        self.image = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """Images [B, channels, height, width] in [0, 1] of codes [B, latent]."""
        maps = self.norm(self.linear(codes).view(-1, *self._first))
        maps = self.middle(F.interpolate(maps, scale_factor=2))
        maps = self.last(F.interpolate(maps, scale_factor=2))
        return torch.sigmoid(self.image(maps))
