"""A loss balancer for NVIDIA Model Optimizer (`modelopt.torch.distill`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dtokd_kernels as dk

try:
    from modelopt.torch.distill import DistillationLossBalancer as _Base
except ImportError:

    class _Base(torch.nn.Module):  # type: ignore[no-redef]
        """What Model Optimizer asks of a balancer: it may be used without it."""

        _student_loss_reduction_fn: Callable[[Any], Tensor] | None = None

        def set_student_loss_reduction_fn(self, student_loss_reduction_fn: Callable[[Any], Tensor]) -> None:
            """What reduces the student's own loss to a scalar first."""
            self._student_loss_reduction_fn = student_loss_reduction_fn


#: Model Optimizer's name of the student's own loss (`modelopt.torch.distill.loss_balancers.STUDENT_LOSS_KEY`).
STUDENT_LOSS = "student_loss"


class LossBalancer(_Base):
    """The losses of a converted model, weighed by any rule of `dtokd_kernels.weighting`.

    Pass it as `loss_balancer` of the mode "kd_loss". `compute_kd_loss(student_loss=...)` then returns a loss whose
    value is the sum of the losses and whose gradient is the balanced one. The objectives are those of Model Optimizer:
    "student_loss", and the class of each criterion with its number, such as "LogitsDistillationLoss_0".

    Model Optimizer calls `backward` on one loss, so the weights are known before the only backward pass: rules without
    a Gram matrix, or one measured at a `Probe` or at a `Feature(module)`. For what `DTOAdamW` measures in its own K
    passes give it the losses themselves: `optimizer.backward(student.compute_kd_loss(loss, skip_balancer=True))`.

    Args:
        balanced: of these losses; `balanced.save_with(optimizer)` has its memory saved.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> from dtokd.modelopt import LossBalancer
        >>> balancer = LossBalancer(dk.BalancedLoss(dk.weighting.LogSum()))
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> balancer({"student_loss": w, "LogitsDistillationLoss_0": 3 * w}).backward()
        >>> w.grad  # the mean of the gradients of both logarithms, each 1 / 2
        tensor(0.5000)
    """

    def __init__(self, balanced: dk.BalancedLoss) -> None:
        super().__init__()
        self.balanced = balanced

    def forward(self, loss: dict[str, Tensor]) -> Tensor:
        """The one loss.

        Args:
            loss: scalars by name; "student_loss" may have any shape if a function that reduces it was set.
        """
        losses = dict(loss)
        if STUDENT_LOSS in losses and self._student_loss_reduction_fn is not None:
            losses[STUDENT_LOSS] = self._student_loss_reduction_fn(losses[STUDENT_LOSS])
        return self.balanced(losses)
