"""Balanced gradients for any optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import kernels
from .checks import check_options, check_params, check_share
from .gradients import GradientSets, Losses
from .ranks import Ranks, initialized
from .reach import of_backward
from .rows import GradientRows
from .solve import commit, solve_sets
from .sources import Source, choose
from .types import Balance, Private, Rescale, Weighting, limit_of


def backward(
    losses: Losses,
    params: Iterable[Tensor],
    weighting: Weighting | None = None,
    *,
    max_norm: float | None = None,
    rescale: Rescale = "none",
    private: Private = "own",
    loss_floor: float = 1e-8,
    scaler: torch.amp.GradScaler | None = None,
    gram: Source | str | None = None,
    features: Tensor | Sequence[Tensor] | None = None,
    share: float = 1.0,
    retain_graph: bool = False,
) -> Balance:
    """Balanced gradients for any optimizer: adds the combined gradient to `.grad`, as `loss.backward()` does.

    Args:
        losses: K scalar tensors, as a sequence or as a dict from names. Pass them as they are: neither divided for
            accumulation nor scaled for fp16.
        params: leaf tensors to balance, such as `model.parameters()`.
        weighting, max_norm, rescale, loss_floor: as in `balance`.
        private: "own": parameters that only some objectives reach stay out of the Gram and take those objectives'
            gradients at weight 1; "balanced": everything is in the Gram.
        scaler: a `torch.amp.GradScaler` for fp16. `.grad` is then scaled as after `scaler.scale(loss).backward()`,
            to be followed by `scaler.step(optimizer)` and `scaler.update()`.
        gram: how the Gram matrix is obtained, a name or an object (`dtokd_kernels.sources`); default: "exact", or
            "none" for a weighting that needs no Gram. An object such as `Every(10)` remembers: pass the same one
            to each call. "lag" needs an optimizer of this package.
        features: the representation at which `sources.Feature()` measures.
        share: this call's part of the batch under accumulation, such as 1 / 4: what is added is multiplied by this.
            The micro-batches are weighed, and clipped, one by one.
        retain_graph: keep the graph after the last pass.

    Returns:
        The `Balance`, in units of the unscaled losses. If it is `skipped`, `.grad` is as before (but on a GPU,
        where the host does not read that, zeros in the place of None); with a scaler and an overflow it is NaN, so that
        the scaler sees it.

    Raises:
        TypeError, ValueError: bad losses, parameters or options; nothing has changed then.

    Effects: one backward pass per loss, or the passes of the source; no host sync on CUDA but in the first call
        with these parameters and objectives (see `reach.Reach`).

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> losses = {"task": (w - 1).square().sum(), "distill": (w - torch.tensor([-1.0, 1.0])).square().sum()}
        >>> dk.backward(losses, [w]).weights
        tensor([0.5000, 0.5000], dtype=torch.float64)
        >>> w.grad
        tensor([ 0., -1.])
    """
    options = check_options("backward", weighting, max_norm, rescale, loss_floor, private)
    source = choose("backward", gram, options)
    if source.measures_in_step:
        raise ValueError(
            f"backward: gram is {gram!r}, but 'lag' measures while an optimizer's step updates; use DTOAdamW or "
            "DTOSGD, or another source, such as 'overlap'"
        )
    check_share("backward", share)
    listed: Sequence[Tensor] = [p for p in _check_once(check_params("backward", params)) if p.requires_grad]
    ranks: Ranks | None = None
    if initialized():
        from .distributed.find import of_backward as ranks_of

        listed, ranks = ranks_of(listed, source, "backward")
    options = replace(options, limit=limit_of(p.dtype for p in listed))
    sets = GradientSets(of_backward(listed))
    sets.collect(losses, listed, source, options, ranks, scaler=scaler, features=features, retain_graph=retain_graph)
    sets.reach.look(sets.grads, ranks)
    columns = list(zip(*sets.grads, strict=True))
    reached = [t for t, column in enumerate(columns) if any(g is not None for g in column)]
    roles = options.roles([sets.reach.of(t, columns[t]) for t in reached])
    rows = GradientRows.of([columns[t] for t in reached], roles)
    combined = [column[0] for column in rows.columns()]
    parts = combined
    if ranks is not None and ranks.shards:
        rows, parts = replace(rows, grads=ranks.local(rows.grads)), ranks.local(combined)
    elif ranks is not None:  # in memory of its own: that of the averaged gradients is lent until the next call
        combined = parts = [torch.empty_like(gradient) for gradient in combined]
    with torch.no_grad():
        record, table = solve_sets(sets, rows, options, ranks, "backward")
        record = replace(record, names=sets.names)
        # the sets stay scaled, as the optimizer's scaler expects `.grad`
        table = table * share
        kernels.combine(rows, table, parts)
        if sets.scale is None:  # else it is the scaler's to find
            overflow = _overflow(parts, ranks)
            if overflow is not None:
                record = replace(record, skipped=record.skipped | overflow.to(record.skipped.device))
        commit(sets, options, record)
        if sets.scale is None and record.skipped.device.type == "cpu" and record.skipped:
            return record
        in_place_of_skipped = torch.zeros_like(record.norm)
        if sets.scale is not None:
            in_place_of_skipped = torch.where(sets.overflowed(record, ranks), torch.nan, torch.zeros_like(record.norm))
        for t, part, value in zip(reached, parts, combined, strict=True):
            if sets.scale is not None or record.skipped.device.type != "cpu":
                torch.where(record.skipped.to(part.device), in_place_of_skipped.to(part), part, out=part)
            p = listed[t]
            p.grad = value if p.grad is None else p.grad.add_(value)
    return record


def _overflow(parts: Sequence[Tensor], ranks: Ranks | None) -> Tensor | None:
    """Scalar bool: whether a float16 number of what the optimizer would be given is not finite; None without any."""
    found = [~part.isfinite().all() for part in parts if part.dtype is torch.float16]
    if not found:
        return None
    overflow = torch.stack([flag.to(found[0].device) for flag in found]).any()
    return overflow if ranks is None or not ranks.shards else ranks.sum(overflow.double()) > 0


def _check_once(params: list[Tensor]) -> list[Tensor]:
    seen: dict[int, int] = {}
    for i, p in enumerate(params):
        if seen.setdefault(id(p), i) != i:
            raise ValueError(f"backward: params[{i}] is params[{seen[id(p)]}] again; pass each parameter once")
    return params
