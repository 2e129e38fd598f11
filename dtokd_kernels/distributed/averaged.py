"""Processes whose trainer averages the gradients of one loss itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ranks import Ranks
from .replicas import average


class Averaged(Ranks):
    """They agree on losses and on what is measured before the backward pass; the pass itself is the trainer's."""

    def average(self, rows: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor | None]]:
        """Gradients from `torch.autograd.grad`, averaged."""
        return average(rows, self.group)
