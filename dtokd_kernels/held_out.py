"""Measuring what lowers the task's loss on samples that are not trained on, for `weighting.HeldOut` and `Auto`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .gradients import Losses, check_loss, gradients_of, named_losses
from .ranks import initialized
from .types import MAX_OBJECTIVES
from .weighting import Auto, HeldOut

_OP = "measure_held_out"


def measure_held_out(
    optimizer: torch.optim.Optimizer,
    losses: Losses,
    held_out: Tensor,
    *,
    weighting: HeldOut | Auto | None = None,
    scaler: torch.amp.GradScaler | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> None:
    """Measure the gradients of the losses and that of the task's loss on held-out samples, and set the weights by them.

    Call it every ten steps or so, before `backward` of the same losses, whose graph it leaves in place. It changes
    neither `.grad` nor parameters. The products are over the parameters that all losses and the held-out loss reach, in
    the metric of the optimizer's state where that is Adam's: x^T y / (sqrt(second moment) + eps) with the
    moment that the steps divide by, else x^T y.

    Args:
        optimizer: whose parameters are trained; any optimizer. Groups with `balance=False` stay out.
        losses: of a training batch, as `backward` takes them; K from 1 to 7.
        held_out: scalar; the primary loss of a batch of samples that are never trained on. Evaluate the model as in
            training, without updating BatchNorm's statistics (`dtokd.train.heldout.frozen_statistics`).
        weighting: the `HeldOut` or `Auto` that learns from it; default: that of the optimizer.
        scaler: a `torch.amp.GradScaler` for fp16, so that small gradients do not underflow. Losses are passed as they
            are. A 64th of its scale is used, and a measurement that overflows all the same is left out.
        process_group: ranks over which gradients are averaged; default: all, if torch.distributed is initialized. On
            all of them the losses must reach the same parameters.

    Raises:
        TypeError: there is no `HeldOut` or `Auto` to set; a loss is no tensor; parameters that are sharded (FSDP2).
        ValueError: more than 7 losses; a loss that is no scalar or needs no gradient; a held-out loss that is not
            finite (in one process on the CPU; elsewhere the measurement is left out) or reaches no parameter that all
            losses reach. Nothing has changed then.

    Effects: K + 1 backward passes; no host sync on CUDA. Nothing once `Auto` has chosen.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = dk.DTOAdamW([w], weighting=dk.weighting.HeldOut("task"))
        >>> losses = {"task": (w - 1).square().sum(), "distill": (w - torch.tensor([1.0, -1.0])).square().sum()}
        >>> dk.measure_held_out(optimizer, losses, held_out=(w[0] - 2).square())
        >>> optimizer.backward(losses)
        >>> optimizer.step()
        >>> optimizer.balance.weights
        tensor([0.7071, 0.7071], dtype=torch.float64)
    """
    weighting = getattr(optimizer, "weighting", None) if weighting is None else weighting
    if not isinstance(weighting, (HeldOut, Auto)):
        raise TypeError(f"{_OP}: weighting is {weighting!r}; pass the HeldOut or Auto that the steps use")
    if weighting.done:
        return
    names, values = named_losses(losses, _OP, MAX_OBJECTIVES - 1)
    check_loss("held_out", held_out, _OP)
    # of several ranks one that stopped here would leave the others waiting for its gradients
    if held_out.device.type == "cpu" and not initialized() and not held_out.isfinite():
        raise ValueError(f"{_OP}: held_out is {held_out.item()}; a held-out batch must have a finite loss")
    if scaler is not None and scaler.is_enabled():
        # the products' ratios do not depend on the scale: stay away from that at which training's gradients overflow
        values, held_out = [scaler.scale(value) / 64 for value in values], scaler.scale(held_out) / 64
    params = [
        p for group in optimizer.param_groups if group.get("balance", True) for p in group["params"] if p.requires_grad
    ]
    rows = gradients_of([*values, held_out], params, _OP)
    shared = [t for t, column in enumerate(zip(*rows, strict=True)) if all(g is not None for g in column)]
    if not shared:
        raise ValueError(
            f"{_OP}: no parameter of the optimizer is reached by the held-out loss and by all of {', '.join(names)}"
        )
    chosen = [[row[t] for t in shared] for row in rows]
    with torch.no_grad():
        if initialized():
            from .distributed.replicas import average

            chosen = average(chosen, process_group)
        gradients = [[g for g in row if g is not None] for row in chosen]
        roots = _metric(optimizer, [params[t] for t in shared])
        if roots is not None:
            gradients = [list(torch._foreach_mul(row, roots)) for row in gradients]
        weighting.observe(ops.gram(gradients), names)


def _metric(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor] | None:
    """The roots of Adam's metric, one tensor for each parameter: what each gradient is multiplied with, or None."""
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    roots, begun = [], []
    for p in params:
        state, group = optimizer.state.get(p, {}), group_of[p]
        second = state.get("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
        if not isinstance(second, Tensor) or second.shape != p.shape or "step" not in state or "betas" not in group:
            return None  # no Adam, its first step, or a state in parts
        steps = torch.as_tensor(state["step"], dtype=torch.float64, device=p.device)
        corrected = second.float() / (1 - group["betas"][1] ** steps).float()
        roots.append((corrected.sqrt() + group["eps"]).rsqrt().to(p.dtype))
        begun.append((steps > 0).to(params[0].device))
    # a first step that was skipped has left a state without any moment
    all_begun = torch.stack(begun).all()
    return [torch.where(all_begun.to(root.device), root, 1.0) for root in roots]
