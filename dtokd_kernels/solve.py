"""From gathered gradient sets to what multiplies them: K sets that are weighed now, or one that was weighed before."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import kernels
from .gradients import GradientSets
from .ranks import Ranks
from .rows import GradientRows
from .sources.source import Gathered, Given
from .sources.unmeasured import stand_in
from .types import Balance, Options, Role
from .weighting.stateful import Stateful


def commit(sets: GradientSets, options: Options, record: Balance) -> None:
    """A step is over: let source and weighting remember what the next needs."""
    sets.source.commit(sets.names, record)
    weighting = options.weighting
    if not isinstance(weighting, Stateful):
        return
    if sets.weighed is not None and weighting.asked and not options.needs_gram:
        assert sets.losses is not None
        # its memory is of the whole batch, not of the last part
        weighting(stand_in(sets.losses, options), sets.losses)
    weighting.commit(record.skipped)


def solve_sets(
    sets: GradientSets, rows: GradientRows, options: Options, ranks: Ranks | None, op: str
) -> tuple[Balance, Tensor]:
    """The balance of the K objectives, and what multiplies the S gradient sets.

    S is K, and the table is the balance's; or the sets are one, already weighed by the source, and S is 1.

    Args:
        sets: what `collect` gathered.
        rows: their gradients.
        options: of the balance.
        ranks: the other processes that train the same model; None if there are none.
        op: what error messages call this.

    Returns:
        The balance; and the table [3, S] float64 by `Role`, for gradients without the scale of a GradScaler: divide it
        by `sets.scale` for those of the sets.
    """
    assert sets.losses is not None
    if sets.weighed is None:
        gathered = Gathered(op, sets.names, sets.losses, sets.params, rows, sets.scale, sets.watch, sets.reach, ranks)
        record = sets.source.solve(gathered, options)
        return record, record.table
    record = sets.weighed
    one = torch.ones(1, dtype=torch.float64, device=sets.losses.device)
    plain = replace(options, weighting=Given(one, log_gradients=False), rescale="none")
    of_sum = kernels.solve(rows, one, plain, sets.scale, ranks)
    coefficients = record.coefficients * of_sum.coefficients.to(record.table.device)
    skipped = of_sum.skipped | record.skipped.to(of_sum.skipped.device)
    measured = record.norm.to(of_sum.norm.device)  # not finite if a gradient that was weighed is not
    norm = torch.where(measured.isfinite(), of_sum.norm, measured)
    record = replace(record, table=coefficients.expand(len(Role), -1), norm=norm, skipped=skipped)
    return record, of_sum.table
