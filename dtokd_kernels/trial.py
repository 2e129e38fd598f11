"""Updates whose numbers may not be finite though the direction is: on copies first.

The largest float16 number is 65504: the square of a gradient of 300 or a sum of momenta leaves it, which no bound on
the gradients' length can exclude without skipping good steps. Other dtypes reach 1e38, where a bound costs nothing
(`types.limit_of`). AdamW with eps = 0 divides 0 by 0 where no gradient has been.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .ranks import Ranks
from .types import Update


def run_tried(
    updates: Sequence[Update], skipped: Tensor, ranks: Ranks | None, run: Callable[[Sequence[Update], Tensor], None]
) -> Tensor:
    """Run updates, or change nothing where `skipped` or where one that needs a trial would write what is not finite.

    Args:
        updates: of all parameters.
        skipped: scalar bool.
        ranks: the other processes that train the same model, which agree if they hold shards; None if there are none.
        run: (updates, scalar bool) carries them out, unless the bool is True.

    Returns:
        Scalar bool on the device of `skipped`: whether nothing has changed.

    Effects: no host sync. Updates that need a trial cost a copy of what they write, and a read of the copy.
    """
    narrow = [update for update in updates if needs_trial(update)]
    if narrow:
        trials = [_Trial(update) for update in narrow]
        run([trial.update for trial in trials], skipped)
        overflow = ~functools.reduce(torch.logical_and, [trial.finite().to(skipped.device) for trial in trials])
        if ranks is not None and ranks.shards:
            overflow = ranks.sum(overflow.double()) > 0
        skipped = skipped | overflow
        for trial in trials:
            trial.keep(~skipped)
    wide = [update for update in updates if not needs_trial(update)] if narrow else updates
    if wide or not narrow:
        run(wide, skipped)
    return skipped


def needs_trial(update: Update) -> bool:
    """Whether the parameters or some of their state are float16, or AdamW's eps is 0."""
    narrow = any(values and values[0].dtype is torch.float16 for values in (update.params, *update.state.values()))
    return narrow or update.options.get("eps") == 0


class _Trial:
    """An update that writes to copies."""

    def __init__(self, update: Update) -> None:
        params = _copies(update.params)
        state = {name: _copies(values) for name, values in update.state.items()}
        self.update = replace(update, params=params, state=state)
        self._written = [*zip(update.params, params, strict=True)]
        for name, values in update.state.items():
            self._written += zip(values, state[name], strict=True)

    def finite(self) -> Tensor:
        """Scalar bool: whether all that was written is finite, or was not before."""
        good = [(copy.isfinite() | ~tensor.isfinite()).all() for tensor, copy in self._written]
        return functools.reduce(torch.logical_and, good)

    def keep(self, kept: Tensor) -> None:
        """Let the tensors be what their copies are, where `kept` (scalar bool)."""
        for tensor, copy in self._written:
            tensor.copy_(torch.where(kept.to(tensor.device), copy, tensor))


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]
