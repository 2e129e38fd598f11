"""Products of gradients taken soon after autograd has written them, a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from .. import kernels
from ..rows import GradientRows
from ..types import Role

#: Bytes of fresh gradients after which their products are taken: about what a core's own cache holds, and on a GPU
#: what its L2 cache holds beside other things; a launch takes as long as reading a few megabytes.
BUCKET = {"cpu": 1 << 20}
GPU_BUCKET = 16 << 20


class Buckets:
    """Collects gradients by key until there is a bucket of them, then adds their Gram matrix to the key's.

    Args:
        backend: the implementation that takes the products; None: the best for each device.
    """

    def __init__(self, backend: str | None) -> None:
        self._backend = backend
        self._waiting: dict[Any, list[Sequence[Tensor | None]]] = {}
        self._bytes: dict[Any, int] = {}
        self.grams: dict[Any, Tensor] = {}

    def add(self, key: Hashable, column: Sequence[Tensor | None]) -> None:
        """The gradients of one parameter, or None; of one dtype and device for each key."""
        self._waiting.setdefault(key, []).append(column)
        gradient = next(g for g in column if g is not None)
        self._bytes[key] = self._bytes.get(key, 0) + gradient.numel() * gradient.element_size()
        if self._bytes[key] >= BUCKET.get(gradient.device.type, GPU_BUCKET):
            self._take(key)

    def finish(self) -> None:
        """Take what is left."""
        for key in list(self._waiting):
            self._take(key)

    def _take(self, key: Hashable) -> None:
        columns = self._waiting.pop(key)
        self._bytes.pop(key)
        rows = GradientRows.of(columns, [Role.SHARED] * len(columns))
        part = kernels.gram(rows, len(columns[0]), self._backend)[Role.SHARED]
        self.grams[key] = self.grams[key] + part if key in self.grams else part
