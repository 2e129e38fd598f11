"""When a run has diverged: its losses are not finite, again and again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import Diverged

#: Iterations in a row, or those of one epoch if it has fewer, but at least two: one bad batch is no divergence.
PATIENCE = 50


class Divergence:
    """Counts on the device how many iterations in a row each loss was not finite; nothing waits for the device.

    Args:
        per_epoch: iterations of an epoch.
    """

    def __init__(self, per_epoch: int) -> None:
        self.patience = max(2, min(PATIENCE, per_epoch))
        self._names: list[str] = []
        self._counts: Tensor | None = None

    @torch.no_grad()
    def add(self, losses: Mapping[str, Tensor], skipped: Tensor | None = None) -> None:
        """One iteration.

        Args:
            losses: scalars, by name; the same names each time.
            skipped: scalar bool, whether a balanced step was skipped: a gradient can be bad where no loss is.
        """
        bad = {name: ~loss.detach().isfinite() for name, loss in losses.items()}
        if skipped is not None:
            bad["a gradient"] = skipped
        device = next(iter(bad.values())).device
        now = torch.stack([value.reshape(()).to(device) for value in bad.values()]).to(torch.float64)
        if self._counts is None or self._names != list(bad):
            self._names, self._counts = list(bad), torch.zeros_like(now)
        self._counts = (self._counts + 1) * now

    @property
    def counts(self) -> Tensor:
        """[names] float64: iterations in a row up to the last one, on the device."""
        assert self._counts is not None
        return self._counts

    def check(self, counts: list[float], epoch: int, iteration: int, remedy: str) -> None:
        """Whether this is a divergence.

        Args:
            counts: of `counts`, on the host; of several ranks the mean.
            epoch, iteration: where the run is, from 0, and the iterations of this epoch so far.
            remedy: what the user can do.

        Raises:
            Diverged: for the names with as many as the patience allows.
        """
        found = [name for name, count in zip(self._names, counts, strict=True) if count >= self.patience]
        # the sum is not finite wherever a part of it is
        found = [name for name in found if name != "loss"] or found
        if found:
            raise Diverged(
                f"the run has diverged: in epoch {epoch + 1}, up to iteration {iteration}, {' and '.join(found)} "
                f"{'was' if len(found) == 1 else 'were'} not finite for {max(counts):.0f} iterations in a row; {remedy}"
            )
