"""Balanced gradients for any optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import backends
from .checks import check_options, check_params
from .gradients import GradientSets, Losses
from .ops import group_rows, solve
from .types import Balance, Private, Rescale, Role, Weighting, of_reach


def backward(
    losses: Losses,
    params: Iterable[Tensor],
    weighting: Weighting | None = None,
    *,
    max_norm: float | None = None,
    rescale: Rescale = "none",
    private: Private = "own",
    loss_floor: float = 1e-8,
    retain_graph: bool = False,
) -> Balance:
    """Balanced gradients for any optimizer: adds the combined gradient to `.grad`, as `loss.backward()` does.

    Args:
        losses: K scalar tensors, as a sequence or as a dict from names.
        params: leaf tensors to balance, such as `model.parameters()`.
        weighting, max_norm, rescale, loss_floor: as in `balance`.
        private: "own": parameters that only some objectives reach stay out of the Gram and take those objectives'
            gradients at weight 1; "balanced": everything is in the Gram.
        retain_graph: keep the graph after the last pass.

    Returns:
        The `Balance`. If it says `skipped`, `.grad` is as before.

    Raises:
        TypeError, ValueError: bad losses, parameters or options; nothing has changed then.

    Effects: one backward pass per loss; no host sync on CUDA.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> losses = {"task": (w - 1).square().sum(), "distill": (w - torch.tensor([-1.0, 1.0])).square().sum()}
        >>> dk.backward(losses, [w]).weights
        tensor([0.5000, 0.5000], dtype=torch.float64)
        >>> w.grad
        tensor([ 0., -1.])
    """
    weighting = check_options("backward", weighting, max_norm, rescale, loss_floor, private)
    params = [p for p in _check_once(check_params("backward", params)) if p.requires_grad]
    sets = GradientSets()
    sets.collect(losses, params, positive=getattr(weighting, "log_gradients", True), retain_graph=retain_graph)
    own = private == "own"
    members: dict[Role, list[int]] = {Role.SHARED: [], Role.PRIVATE: []}  # parameters that are reached
    rows = list(zip(*sets.grads, strict=True))
    for index, row in enumerate(rows):
        if any(g is not None for g in row):
            members[Role.PRIVATE if own and any(g is None for g in row) else Role.SHARED].append(index)
    groups = {role: group_rows([rows[i] for i in where]) for role, where in members.items()}
    assert sets.losses is not None
    with torch.no_grad():
        record = solve(
            {role: [group for group, _ in found.values()] for role, found in groups.items() if found},
            sets.losses,
            weighting,
            max_norm=max_norm,
            rescale=rescale,
            loss_floor=loss_floor,
        )
        if record.skipped.device.type == "cpu" and record.skipped:
            return record
        for role, found in groups.items():
            for (reach, lists), where in found.values():
                device = lists[0][0].device
                chosen = of_reach(record.table[role].to(device), reach)
                values = backends.select(device).combine(lists, chosen, lists[0])
                for i, value in zip(where, values, strict=True):
                    _add_to_grad(params[members[role][i]], value, record.skipped)
    return record


def _check_once(params: list[Tensor]) -> list[Tensor]:
    seen: dict[int, int] = {}
    for i, p in enumerate(params):
        if seen.setdefault(id(p), i) != i:
            raise ValueError(f"backward: params[{i}] is params[{seen[id(p)]}] again; pass each parameter once")
    return params


def _add_to_grad(p: Tensor, value: Tensor, skipped: Tensor) -> None:
    if skipped.device.type != "cpu":
        value = torch.where(skipped.to(p.device), torch.zeros_like(value), value)
    p.grad = value if p.grad is None else p.grad.add_(value)
