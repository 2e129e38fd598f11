"""What objectives remember of earlier batches: the same on all ranks, and part of a checkpoint."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

#: A logit whose probability beside any cosine's is 0 in float32, and whose product with it is no NaN.
NOTHING = -1e4


def of_all_ranks(rows: Tensor) -> Tensor:
    """The rows [n, ...] of every rank, one rank after another; this process's own where there is no other.

    Every rank calls it with as many rows. The result has no graph and the same bits on all ranks.
    """
    rows = rows.detach().contiguous()
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


class Queue(nn.Module):
    """The newest rows of a teacher's features, each of length 1: those of the last batches of all ranks.

    Args:
        size: rows at most.
        width: of a row.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, width))
        self.register_buffer("taken", torch.zeros(size, dtype=torch.bool))
        self.rows: Tensor
        self.taken: Tensor

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Put the rows [n, width] of all ranks before the others; the oldest leave. All ranks call it."""
        new = F.normalize(of_all_ranks(rows), dim=1)
        size = len(self.rows)
        self.rows.copy_(torch.cat([new, self.rows])[:size])
        self.taken.copy_(torch.cat([self.taken.new_ones(len(new)), self.taken])[:size])

    def logits(self, rows: Tensor, temperature: float) -> Tensor:
        """[n, size]: cosines of the rows with those of the queue over the temperature; `NOTHING` where none is yet."""
        cosines = F.normalize(rows, dim=1) @ self.rows.clone().mT  # the graph keeps it, and `push` changes it
        return (cosines / temperature).masked_fill(~self.taken, NOTHING)
