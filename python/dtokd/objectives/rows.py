"""A row of a teacher's cache as bytes: a checksum, then each column, filled up to whole words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

#: Bytes of the checksum, which is the first of a row; columns begin at multiples of it.
_WORD = 8


class Layout:
    """Where a row's bytes are.

    Args:
        columns: by name, the dtype and the shape of a row's numbers.
    """

    def __init__(self, columns: Mapping[str, tuple[str, Sequence[int]]]) -> None:
        self.columns = {name: (dtype, tuple(shape)) for name, (dtype, shape) in columns.items()}
        self._ends: dict[str, tuple[int, int]] = {}
        at = _WORD
        for name, (dtype, shape) in self.columns.items():
            size = getattr(torch, dtype).itemsize * int(np.prod(shape, dtype=np.int64))
            self._ends[name] = at, at + size
            at += -(-size // _WORD) * _WORD
        self.size = at
        words = torch.Generator().manual_seed(0)
        # odd: a word that is another one changes the sum, whatever the others are
        self._factors = torch.randint(-(2**62), 2**62, (at // _WORD + 1,), generator=words) * 2 + 1

    @classmethod
    def of(cls, columns: Mapping[str, Tensor]) -> Layout:
        """That of columns [B, ...]."""
        return cls({name: (str(c.dtype).removeprefix("torch."), c.shape[1:]) for name, c in columns.items()})

    def pack(self, columns: Mapping[str, Tensor], keys: Tensor) -> Tensor:
        """[B, size] uint8, on the CPU."""
        rows = torch.zeros(len(keys), self.size, dtype=torch.uint8)
        for name, (begin, end) in self._ends.items():
            rows[:, begin:end] = columns[name].detach().cpu().reshape(len(keys), -1).contiguous().view(torch.uint8)
        rows[:, :_WORD] = self._sum(rows, keys)[:, None].contiguous().view(torch.uint8)
        return rows

    def unpack(self, rows: Tensor) -> dict[str, Tensor]:
        """The columns of [B, size]."""
        return {
            name: rows[:, begin:end].contiguous().view(getattr(torch, self.columns[name][0]))
            .reshape(len(rows), *self.columns[name][1])
            for name, (begin, end) in self._ends.items()
        }  # fmt: skip

    def whole(self, rows: Tensor, keys: Tensor) -> Tensor:
        """[B] bool, which rows are there, undamaged, and of these keys."""
        return self._sum(rows, keys) == rows[:, :_WORD].contiguous().view(torch.int64)[:, 0]

    def _sum(self, rows: Tensor, keys: Tensor) -> Tensor:
        words = torch.cat([rows[:, _WORD:].contiguous().view(torch.int64), keys + 1], 1)
        return (words * self._factors[: words.shape[1]]).sum(1)
