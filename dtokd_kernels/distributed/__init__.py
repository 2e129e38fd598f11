"""Balanced steps on many ranks: the gradients of all objectives are averaged, so that all ranks take the same step.

optimizer = dk.DTOAdamW(model.parameters())
model = DistributedDataParallel(model)
dk.distributed.attach(optimizer, model)        # from here on as on one device

`docs/distributed.md` describes how it works and what it costs.
"""

from ..ranks import Ranks
from .attach import attach
from .replicas import Replicas
from .state import whole_state

__all__ = ["Ranks", "Replicas", "attach", "whole_state"]
