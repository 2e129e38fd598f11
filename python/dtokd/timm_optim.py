"""timm's names for the balanced optimizers, and a loss scaler for its training loop.

Importing this module registers "dtoadamw" and "dtosgd" with timm: `timm.optim.create_optimizer_v2(model, "dtoadamw",
lr=1e-3, weight_decay=0.05, layer_decay=0.75)` then makes them with timm's parameter groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import Lookahead
from timm.optim import _optim_factory as factory
from timm.utils.clip_grad import dispatch_clip_grad
from timm.utils.cuda import NativeScaler
from torch import Tensor

from dtokd_kernels import DTOSGD, DTOAdamW, backward
from dtokd_kernels.balanced import Balanced
from dtokd_kernels.gradients import Losses

#: As timm's own "adamw" and "sgd" are described there.
OPTIMIZERS = (
    factory.OptimInfo(
        name="dtoadamw",
        opt_class=DTOAdamW,
        description="AdamW on DTO-KD's balanced direction of several losses",
        has_betas=True,
    ),
    factory.OptimInfo(
        name="dtosgd",
        opt_class=DTOSGD,
        description="SGD with Nesterov momentum on DTO-KD's balanced direction of several losses",
        has_eps=False,
        has_momentum=True,
        defaults={"nesterov": True},
    ),
)

for info in OPTIMIZERS:
    factory.default_registry.register(info)


class DTOScaler(NativeScaler):
    """timm's `NativeScaler` for several losses: backward passes, clipping, step and scale in one call.

    Args:
        device: the type of the device, as in `NativeScaler`.
        enabled: False scales nothing, for float32 and bfloat16.
        balance: options of `dtokd_kernels.backward` (weighting, rescale, ...), for other optimizers than DTOAdamW and
            DTOSGD, which have these options themselves.
    """

    def __init__(self, device: str = "cuda", enabled: bool = True, **balance: Any) -> None:
        self._scaler = torch.amp.GradScaler(device=device, enabled=enabled)
        self._balance = balance

    def __call__(
        self,
        losses: Losses,
        optimizer: torch.optim.Optimizer,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Iterable[Tensor] | None = None,
        create_graph: bool = False,
        need_update: bool = True,
        *,
        share: float = 1.0,
    ) -> None:
        """One micro-batch; with `need_update` the step that ends its accumulation.

        Args:
            losses: as they are (neither scaled nor, as in timm, divided by the number of accumulation steps), by
                position or by name, such as `{"task": ..., "distill": ...}`.
            optimizer: DTOAdamW or DTOSGD; any other takes the balanced gradients as its own.
            clip_grad: largest norm of the combined direction (of all that the optimizer holds), or what `clip_mode`
                makes of it; None leaves the optimizer's `max_norm` as it is.
            clip_mode: "norm"; "value" and "agc" clip gradients one by one, which takes another optimizer.
            parameters: what to clip, with another optimizer.
            create_graph: not supported.
            need_update: False only accumulates.
            share: this micro-batch's part of its accumulation, such as 1 / 4.

        Raises:
            TypeError, ValueError: bad losses, a `clip_mode` that does not fit the optimizer, `create_graph`, Lookahead
                around an optimizer of ours.
        """
        if create_graph:
            raise ValueError(
                "DTOScaler: create_graph is True, but balanced gradients are not differentiable; pass False"
            )
        if isinstance(optimizer, Lookahead) and isinstance(optimizer._base_optimizer, Balanced):
            name = type(optimizer._base_optimizer).__name__
            raise TypeError(
                f"DTOScaler: optimizer is timm's Lookahead around {name}, which looks at the gradients in .grad, where "
                f"{name} leaves none; pass {name} alone, or Lookahead around another optimizer"
            )
        if not isinstance(optimizer, Balanced):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            backward(losses, params, scaler=self._scaler, share=share, **self._balance)
            if need_update:
                if clip_grad is not None:
                    self._scaler.unscale_(optimizer)
                    dispatch_clip_grad(params if parameters is None else parameters, clip_grad, mode=clip_mode)
                self._step(optimizer)
            return
        if clip_grad is not None:
            if clip_mode != "norm":
                raise ValueError(
                    f"DTOScaler: clip_mode is {clip_mode!r}, but {type(optimizer).__name__} only clips the combined "
                    "direction's norm; pass 'norm', or another optimizer"
                )
            optimizer.max_norm = clip_grad
        optimizer.backward(losses, share=share, scaler=self._scaler)
        if need_update:
            self._step(optimizer)

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        self._scaler.step(optimizer)
        self._scaler.update()
