"""fp16 loss scaling with K gradient sets."""

from __future__ import annotations

import torch
from torch import Tensor

from .optim import Balanced


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` that knows gradient sets; use it in its place, for any optimizers.

    torch's own looks for overflows in `p.grad`, before the optimizer's step; the K gradient sets of `DTOAdamW` and
    `DTOSGD` are elsewhere, and the Gram matrix, which shows an overflow in any of them, is taken in the step. So
    `update` needs to be told afterwards, and an optimizer has no way to tell torch's scaler. (With it `step` raises an
    error that names this class.) For other optimizers nothing changes.

    The scale S costs no pass over the gradients: the K x K Gram matrix is divided by S^2, the K losses and coefficients
    by S. Everything in `optimizer.balance` is in the units of the unscaled losses, as are `max_norm` and `loss_floor`.

    Args: as for `torch.amp.GradScaler`.

    Effects: no host sync. A step whose gradients overflowed changes nothing, counts in `optimizer.skipped_steps`, and
        `update` lowers the scale.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> student = torch.nn.Linear(4, 2)
        >>> optimizer, scaler = dk.DTOAdamW(student.parameters()), dk.amp.GradScaler("cpu", init_scale=1024)
        >>> with torch.autocast("cpu", torch.float16):
        ...     out = student(torch.ones(3, 4)).float()
        >>> task, distill = out.square().mean(), (out - 1).square().mean()
        >>> optimizer.backward({"task": scaler.scale(task), "distill": scaler.scale(distill)})
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> optimizer.zero_grad()
        >>> int(optimizer.skipped_steps)
        0
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Where torch's scalers differ in what gradients are (see `ShardedGradScaler`).

        `unscale_` calls this with 1 / S, `step` before the optimizer's step with 1; `update` reads what it returns.
        """
        if not isinstance(optimizer, Balanced):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        optimizer.expect_scaled(inv_scale, found_inf)
        return {found_inf.device: found_inf}
