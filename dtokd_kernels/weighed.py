"""From gathered gradient sets to what multiplies them: K sets that are weighed now, or one that was weighed before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from . import ops
from .gradients import GradientSets
from .sources.source import Gathered, Given, Source
from .types import Balance, Group, Options, Role
from .weighting.stateful import Stateful


def commit(sets: GradientSets, source: Source, options: Options, record: Balance) -> None:
    """A step is over: let source and weighting remember what the next needs."""
    source.commit(sets.names, record)
    weighting = options.weighting
    if not isinstance(weighting, Stateful):
        return
    if sets.weighed is not None and weighting.asked and not options.needs_gram:
        # its memory is of the whole batch, not of the last part, and of losses without a GradScaler's factor
        assert sets.losses is not None
        losses = sets.losses if options.loss_scale is None else sets.losses / options.loss_scale.to(sets.losses.device)
        weighting(record.gram, losses)
    weighting.commit(record.skipped)


def solve_sets(
    sets: GradientSets, groups: Mapping[Role, Sequence[Group]], source: Source, options: Options
) -> tuple[Balance, Balance]:
    """The balance of the objectives, and that of the sets: what multiplies them.

    They are the same unless the sets are one, already weighed by the source. Then the first has K coefficients, as
    the losses were multiplied, and the second has one. With a loss scale, the second's table divides by it.

    Args:
        sets: what `collect` gathered.
        groups: their gradients by role.
        source: of the Gram matrix.
        options: of the balance.

    Raises:
        RuntimeError: a loss scale with log-gradients that were weighed before it was known.
    """
    assert sets.losses is not None
    scale = options.loss_scale
    if sets.weighed is None:
        record = source.solve(Gathered(sets.names, sets.losses, sets.params, groups, sets.watch), options)
        if scale is None:
            return record, record
        return record, replace(record, table=record.table / scale.to(record.table.device))
    record = sets.weighed
    if scale is not None:
        if source.scale_free(options):
            raise RuntimeError(
                "step: a GradScaler cannot be used with one backward pass over log-gradients, nor with NashMTL: their "
                "coefficients take the scale out before the pass; use rescale='sum', gram='exact', or bfloat16 autocast"
            )
        record = source.unscale(record, scale.to(record.table.device))
    # such directions do not shrink when a loss is divided by the number of its parts, so their sum is a mean
    parts = sets.calls if source.scale_free(options) else 1
    factor = torch.full((1,), 1 / parts, dtype=torch.float64, device=sets.losses.device)
    plain = replace(options, weighting=Given(factor, log_gradients=False), rescale="none")
    of_sum = ops.solve(groups, torch.ones_like(factor), plain)
    skipped = of_sum.skipped | record.skipped.to(of_sum.skipped.device)
    coefficients = record.coefficients * of_sum.coefficients.to(record.table.device)
    record = replace(record, table=coefficients.expand(len(Role), -1), norm=of_sum.norm, skipped=skipped)
    table = of_sum.table if scale is None else of_sum.table / scale.to(of_sum.table.device)
    return record, replace(of_sum, table=table, skipped=skipped)
