"""Products of gradients taken soon after autograd has written them, a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from .. import backends

#: Bytes of fresh gradients after which their products are taken: about what a core's own cache holds, and on a GPU
#: what its L2 cache holds beside other things; a launch takes as long as reading a few megabytes.
BUCKET = {"cpu": 1 << 20}
GPU_BUCKET = 16 << 20


class Buckets:
    """Collects tensors by key until there is a bucket of them, then adds their Gram matrix to the key's.

    Args:
        backend: who takes the products.
    """

    def __init__(self, backend: str | None) -> None:
        self._backend = backend
        self._waiting: dict[Any, list[list[Tensor]]] = {}
        self._bytes: dict[Any, int] = {}
        self.grams: dict[Any, Tensor] = {}

    def add(self, key: Hashable, tensors: list[Tensor]) -> None:
        """One tensor per list, of one dtype and device for each key."""
        lists = self._waiting.setdefault(key, [[] for _ in tensors])
        for values, tensor in zip(lists, tensors, strict=True):
            values.append(tensor)
        size = self._bytes.get(key, 0) + tensors[-1].numel() * tensors[-1].element_size()
        self._bytes[key] = size
        if size >= BUCKET.get(tensors[-1].device.type, GPU_BUCKET):
            self._take(key)

    def finish(self) -> None:
        """Take what is left."""
        for key in list(self._waiting):
            self._take(key)

    def _take(self, key: Hashable) -> None:
        lists = self._waiting.pop(key)
        self._bytes.pop(key)
        part = backends.select(lists[0][0].device, self._backend).gram(lists)
        self.grams[key] = self.grams[key] + part if key in self.grams else part
