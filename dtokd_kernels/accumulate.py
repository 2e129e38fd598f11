"""Balanced gradients for any optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import backends
from .checks import check_options, check_params
from .gradients import GradientSets, Losses
from .ops import gram_of_groups, group_rows, of_reach
from .types import Balance, Private, Rescale, Weighting


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
        >>> losses = {"task": (w - 1).square().sum(), "distill": (w - torch.tensor([3.0, 1.0])).square().sum()}
        >>> dk.backward(losses, [w]).weights
        tensor([0.8333, 0.1667], dtype=torch.float64)
    """
    weighting = check_options("backward", weighting, max_norm, rescale, loss_floor, private)
    params = [p for p in check_params("backward", params) if p.requires_grad]
    sets = GradientSets()
    sets.collect(
        losses, params, positive=getattr(weighting, "log_gradients", True), retain_graph=retain_graph
    )
    K = len(sets.names)
    reached = [p for p in params if any(g is not None for g in sets.rows[p])]
    roles = {False: [], True: []}  # type: dict[bool, list[Tensor]]
    for p in reached:
        roles[private == "own" and any(g is None for g in sets.rows[p])].append(p)
    with torch.no_grad():
        device = sets.losses.device if sets.losses is not None else None
        grams = []
        for members in roles.values():
            groups = group_rows([sets.rows[p] for p in members])
            grams.append(gram_of_groups([g for g, _ in groups.values()], K) if members else None)
        shared_gram = grams[0] if grams[0] is not None else torch.zeros(K, K, dtype=torch.float64, device=device)
        record = backends.select(shared_gram.device).balance(
            shared_gram, sets.losses, weighting,
            max_norm=max_norm, rescale=rescale, loss_floor=loss_floor, private_gram=grams[1],
        )  # fmt: skip
        if record.skipped.device.type == "cpu" and record.skipped:
            return record
        for is_private, members in roles.items():
            coefficients = record.private_coefficients if is_private else record.coefficients
            for (reach, lists), where in group_rows([sets.rows[p] for p in members]).values():
                chosen = of_reach(coefficients.to(lists[0][0].device), reach)
                values = backends.select(lists[0][0].device).combine(lists, chosen, lists[0])
                for i, value in zip(where, values, strict=True):
                    _add_to_grad(members[i], value, record.skipped)
    return record


def _add_to_grad(p: Tensor, value: Tensor, skipped: Tensor) -> None:
    if skipped.device.type != "cpu":
        value = torch.where(skipped.to(p.device), torch.zeros_like(value), value)
    p.grad = value if p.grad is None else p.grad.add_(value)
