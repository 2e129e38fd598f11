"""Images that can be made again: everything random about one is a function of (seed, sample, view).

What timm draws from the generators of a worker, of a batch and of the main process is drawn here from generators that
are seeded for each image, or for each pair that is mixed. So it is the same in any worker, on any rank, and in every
epoch of a view, which is an augmentation of the whole data set: epoch e shows view e modulo the number of views.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.data import FastCollateMixup
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..objectives.cache import CachedImages, Keyed
from .randomness import kept

#: Sample and view.
Key = tuple[int, int]


class KeyedDataset(Dataset[tuple[Any, Any, Key]]):
    """A data set by (sample, view): items are an image, its target, and this key.

    While an item is made, the global generators of Python, numpy and torch are seeded by the key, and put back after.

    Args:
        dataset: map-style, of (image, target), with its transform.
        seed: of the augmentation.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    @property
    def transform(self) -> Any:
        """Of the data set, as timm's loaders set it."""
        return getattr(self.dataset, "transform", None)

    @transform.setter
    def transform(self, value: Any) -> None:
        self.dataset.transform = value

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple[Any, Any, Key]:
        with seeded(self.seed, *key):
            image, target = self.dataset[key[0]]
        return image, target, key


class KeyedOrder(Sampler[list[Key]]):
    """Batches of keys: groups of samples that belong together are fixed for a view, their order is another each epoch.

    A group is one image, two where images are mixed, or a whole batch where its images share a padding. The samples
    that do not fill a batch are the same whenever a view comes again, so that a cache is complete after each view has
    come once.

    Args:
        count: samples of the data set.
        batch_size: of a rank.
        seed: of groups and orders.
        views: augmentations per sample; 0: another one in each epoch.
        group: samples that belong together; it divides the batch size.
        unmixed_from: the epoch from which on nothing is mixed any more, or 0; these epochs have views of their own.
        rank, size: of the processes that share an epoch.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        views: int,
        group: int = 1,
        unmixed_from: int = 0,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self.count, self.batch_size, self.seed, self.views, self.group = count, batch_size, seed, views, group
        self.unmixed_from, self.rank, self.size, self.epoch = unmixed_from, rank, size, 0

    def set_epoch(self, epoch: int) -> None:
        """Before each epoch."""
        self.epoch = epoch

    def view(self, epoch: int) -> int:
        """Of an epoch; below 0 where nothing is mixed any more."""
        view = epoch % self.views if self.views else epoch
        return -1 - view if self.unmixed_from and epoch >= self.unmixed_from else view

    def groups(self, view: int) -> Tensor:
        """[groups, group] int64, the samples that an epoch of the view shows."""
        order = torch.randperm(self.count, generator=_generator(self.seed, "groups", view))
        return order[: len(self) * self.batch_size * self.size].view(-1, self.group)

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.size)

    def __iter__(self) -> Iterator[list[Key]]:
        view = self.view(self.epoch)
        groups = self.groups(view)
        order = torch.randperm(len(groups), generator=_generator(self.seed, "order", self.epoch))
        for batch in groups[order[self.rank :: self.size]].view(-1, self.batch_size).tolist():
            yield [(sample, view) for sample in batch]


class KeyedCollate:
    """Timm's collation, with mixup and cutmix drawn for each pair of images from the seeds of its own.

    Args:
        mixup: timm's, or None; of a pair it makes what it makes of a batch of two.
        seed: of the mixing.
    """

    def __init__(self, mixup: FastCollateMixup | None, seed: int) -> None:
        self.mixup, self.seed = mixup, seed

    def __call__(self, batch: Sequence[tuple[Any, Any, Key]]) -> tuple[Tensor, Keyed]:
        """Images uint8 [B, C, H, W], and targets with their keys."""
        samples, keys = [(image, target) for image, target, _ in batch], [key for *_, key in batch]
        if self.mixup is None:
            images, targets = fast_collate(samples)
        else:
            parts = [self._mix(samples[i : i + 2], keys[i : i + 2]) for i in range(0, len(batch), 2)]
            images, targets = (torch.cat(part) for part in zip(*parts, strict=True))
        return images, Keyed(targets, torch.tensor(keys))

    def _mix(self, pair: list[tuple[Any, Any]], keys: list[Key]) -> tuple[Tensor, Tensor]:
        assert self.mixup is not None
        with seeded(self.seed, "mixup", keys):
            images, targets = self.mixup(pair)
        return images, targets


class ErasedLoader:
    """Timm's loader of keyed images, with random erasing drawn for each image from seeds of its own.

    Args:
        loader: of normalised images and `Keyed` targets.
        erasing: timm's; its noise is made on the images' device, and another one on another kind of device.
        seed: of the erasing.
    """

    def __init__(self, loader: Any, erasing: RandomErasing, seed: int) -> None:
        self.loader, self._erasing, self._seed = loader, erasing, seed

    @property
    def sampler(self) -> Any:
        """Of the loader."""
        return self.loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Keyed]]:
        for images, target in self.loader:
            with kept():
                for image, key in zip(images, target.keys.tolist(), strict=True):
                    number = _number(self._seed, "erasing", key)
                    _seed(number)
                    if images.is_cuda:
                        torch.cuda.manual_seed(number)  # of the noise
                    self._erasing(image)
            yield images, target


def seed_of(options: argparse.Namespace) -> int:
    """Of everything random about the images of a run with a cache."""
    return int(options.seed if options.data_seed is None else options.data_seed)


def cached_images(options: argparse.Namespace, order: KeyedOrder, told: Mapping[str, Any]) -> CachedImages:
    """What a run will ask of its cache.

    Args:
        options: of `train.options`: how many epochs there are.
        order: of the batches.
        told: what the images depend on besides the seed.
    """
    epochs = options.epochs + (options.cooldown_epochs or 0)
    epochs += options.warmup_epochs if options.warmup_prefix else 0
    views = dict.fromkeys(order.view(epoch) for epoch in range(epochs))
    return CachedImages(order.count, {view: order.groups(view).flatten() for view in views}, order.seed, dict(told))


@contextmanager
def seeded(*told: Any) -> Iterator[None]:
    """With the global generators of Python, numpy and torch seeded by values, and put back after."""
    with kept():
        _seed(_number(*told))
        yield


def _seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)


def _generator(*told: Any) -> torch.Generator:
    return torch.Generator().manual_seed(_number(*told))


def _number(*told: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(told).encode(), digest_size=4).digest(), "big")
