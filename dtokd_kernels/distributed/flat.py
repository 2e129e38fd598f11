"""Many tensors in one flat one, each at a place that GPU kernels read and write 16 bytes at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Elements at whose multiples a tensor begins: 16 bytes of the narrowest dtype that kernels know, so that a parameter's
#: gradients, its state and its parts on several ranks are aligned alike, whatever the dtype of each.
ALIGNED = 8


def up(count: int) -> int:
    """The next multiple of `ALIGNED`."""
    return -(-count // ALIGNED) * ALIGNED


@dataclass(frozen=True)
class Flat:
    """Where tensors lie in a flat one, in their order.

    Attributes:
        members: the tensors, of one dtype and device.
        starts: where each begins.
        size: of the flat tensor.
    """

    members: list[Tensor]
    starts: list[int]
    size: int

    @classmethod
    def of(cls, members: Sequence[Tensor]) -> Flat:
        """The places of tensors."""
        starts, size = [], 0
        for p in members:
            starts.append(size)
            size += up(p.numel())
        return cls(list(members), starts, size)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Its parts, each with the shape and strides that autograd gives a gradient of the member."""
        views = []
        for p, start in zip(self.members, self.starts, strict=True):
            if p.is_contiguous():
                views.append(flat[start : start + p.numel()].view(p.shape))
            else:
                strides = torch.empty_like(p, device="meta").stride()
                views.append(flat.as_strided(p.shape, strides, start))
        return views

    def clear_gaps(self, flat: Tensor) -> None:
        """Zeros where no tensor lies: what is sent must be numbers."""
        for p, start in zip(self.members, self.starts, strict=True):
            end = start + p.numel()
            if end < start + up(p.numel()):
                flat[end : start + up(p.numel())].zero_()
