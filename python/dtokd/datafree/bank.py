"""The images that were made, as many as fit: the newest replace the oldest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Bank:
    """A store of images in memory, a byte for a value, and their labels.

    Args:
        limit: images, at most.
        size: channels, height and width.
        device: where they are kept.

    Attributes:
        added: images that were added since the beginning; image number n is at the place n % limit.
    """

    def __init__(self, limit: int, size: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        self.limit, self.size = limit, size
        self._images = torch.zeros(0, *size, dtype=torch.uint8, device=device)
        self._labels = torch.zeros(0, dtype=torch.long, device=device)
        self.added = 0

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def bytes(self) -> int:
        """That a full bank takes."""
        return bytes_of(self.limit, self.size)

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor) -> None:
        """Add images [B, channels, height, width] in [0, 1], and the class of each [B]."""
        images, labels = images[-self.limit :], labels[-self.limit :]
        pixels = images.clamp(0, 1).mul(255).round().to(torch.uint8).to(self._images.device)
        labels = labels.to(self._labels.device)
        room = self.limit - len(self)
        self._images = torch.cat([self._images, pixels[:room]])
        self._labels = torch.cat([self._labels, labels[:room]])
        rest = len(pixels) - min(room, len(pixels))
        if rest:
            oldest = (self.added + len(pixels) - rest + torch.arange(rest, device=self._labels.device)) % self.limit
            self._images[oldest], self._labels[oldest] = pixels[-rest:], labels[-rest:]
        self.added += len(pixels)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Images [count, channels, height, width] in [0, 1] and labels [count], at random, with replacement."""
        chosen = torch.randint(0, len(self), (count,), device=self._labels.device)
        return self._images[chosen].float() / 255, self._labels[chosen]

    def newest(self, count: int) -> tuple[Tensor, Tensor]:
        """The images that were added last, in their order, [n, channels, height, width] uint8, and their labels."""
        count = min(count, len(self))
        last = (self.added - count + torch.arange(count, device=self._labels.device)) % self.limit
        return self._images[last], self._labels[last]

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"images": self._images, "labels": self._labels, "added": self.added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As it was; where there was another limit with the newest that fit.

        Raises:
            ValueError: the images are of another size.
        """
        images = state["images"]
        if tuple(images.shape[1:]) != self.size:
            raise ValueError(f"Bank: images of {tuple(images.shape[1:])}, expected {self.size}")
        device = self._images.device
        # copies: what was loaded may be kept by its owner
        self._images, self._labels = images.to(device, copy=True), state["labels"].to(device, copy=True)
        self.added, count = state["added"], len(images)
        if count > self.limit or count < min(self.added, self.limit):  # of a larger one, or a smaller one that was full
            ordered = (t.roll(-(self.added % count), 0)[-self.limit :] for t in (self._images, self._labels))
            self._images, self._labels = ordered
            self.added = len(self)


def bytes_of(count: int, size: tuple[int, int, int]) -> int:
    """That so many images take."""
    return count * size[0] * size[1] * size[2]
