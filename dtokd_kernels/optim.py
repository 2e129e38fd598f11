"""DTOAdamW, DTOSGD and DTOLion: torch's AdamW and SGD, and Lion, on a balanced direction.

optimizer.backward({"task": task_loss, "distill": distill_loss})   # K gradient sets
optimizer.step()                                                   # Gram -> weights -> update
optimizer.zero_grad()
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .balanced import Balanced
from .checks import is_number
from .rules import RULES
from .sources import Source
from .types import Private, Rescale, Weighting

_SHARED_ARGS = """weighting: how the Gram matrix becomes weights; default `weighting.DTO()`.
        max_norm: clip the combined direction to this norm; costs no pass, as the norm comes from the Gram matrix.
        rescale: "none" multiplies gradients by pi_i / L_i (the paper); "sum" divides these by their sum, so that
            learning rates tuned for a weighted sum of the losses keep their meaning.
        private: "own": parameters that only some objectives reach (a head, a projector) stay out of the Gram and
            take those objectives' gradients at weight 1 (1 / L_i with rescale "none"); "balanced": all in the Gram.
        loss_floor: gradients are divided by this in place of a smaller loss.
        gram: how the Gram matrix is obtained: "exact", "overlap", "lag", or an object of `dtokd_kernels.sources`:
            `Probe`, `Feature`, `Every`, `Ema`. Default: "exact", or "none", one backward pass of the weighted sum of
            the losses, for a weighting that needs no Gram matrix.
        backend: "cuda", "triton", "cpu" or "reference"; default: the best for the parameters' device.
        state_dtype: dtype of the moments, float32 or bfloat16; default: the parameter's, as in torch.
        master_weights: keep a float32 copy of each half-precision parameter in the state ("master"), of which the
            parameter is the rounding, so that small updates are not lost. If other code writes a parameter, the new
            value replaces the copy; a write through `p.data` is not noticed.
        foreach, fused: accepted for compatibility with torch, without effect: `backend` chooses what runs.

    A parameter group takes `balance=False`: its gradient is the sum of the objectives' gradients."""


class DTOAdamW(Balanced, torch.optim.AdamW):  # noqa: D101
    __doc__ = f"""AdamW on DTO-KD's balanced direction; a drop-in for `torch.optim.AdamW` with K losses.

    Source: DTO-KD (ICLR 2026), Eq. 8-12; AdamW (ICLR 2019).

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as in `torch.optim.AdamW`. `maximize` reverses the
            combined direction.
        {_SHARED_ARGS}

    State names are torch's, so `state_dict` loads into `torch.optim.AdamW` and back.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> student = torch.nn.Linear(4, 2)
        >>> optimizer = dk.DTOAdamW(student.parameters(), lr=1e-3, max_norm=1.0)
        >>> out = student(torch.ones(3, 4))
        >>> optimizer.backward({{"task": out.square().mean(), "distill": (out - 1).square().mean()}})
        >>> optimizer.step()
        >>> optimizer.zero_grad()
        >>> bool((optimizer.balance.weights >= 0).all())
        True
    """

    _rule = RULES["adamw"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        weighting: Weighting | None = None,
        max_norm: float | None = None,
        rescale: Rescale = "none",
        private: Private = "own",
        loss_floor: float = 1e-8,
        gram: Source | str | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self._set(weighting, max_norm, rescale, private, loss_floor, gram, backend, state_dtype, master_weights)
        torch.optim.AdamW.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, capturable=capturable
        )


class DTOSGD(Balanced, torch.optim.SGD):  # noqa: D101
    __doc__ = f"""SGD on DTO-KD's balanced direction; a drop-in for `torch.optim.SGD` with K losses.

    Source: DTO-KD (ICLR 2026), Eq. 8-12.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`. `maximize` reverses the
            combined direction.
        {_SHARED_ARGS}

    `rescale` is "sum" by default: SGD feels the factor 1 / L_i as a learning rate. Weightings of raw gradients
    (`Fixed`, `PCGrad`, ...) have no such factor: with them pass "none", or their sums become means.

    With `dampening`, the step after the one that begins the momentum waits for the device once, to learn whether that
    one was skipped; so capture a later step in a CUDA graph.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> student = torch.nn.Linear(4, 2)
        >>> optimizer = dk.DTOSGD(student.parameters(), lr=0.1, momentum=0.9)
        >>> out = student(torch.ones(3, 4))
        >>> optimizer.backward([out.square().mean(), (out - 1).square().mean()])
        >>> optimizer.step()
    """

    _rule = RULES["sgd"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        weighting: Weighting | None = None,
        max_norm: float | None = None,
        rescale: Rescale = "sum",
        private: Private = "own",
        loss_floor: float = 1e-8,
        gram: Source | str | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self._set(weighting, max_norm, rescale, private, loss_floor, gram, backend, state_dtype, master_weights)
        torch.optim.SGD.__init__(self, params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)


class DTOLion(Balanced):  # noqa: D101
    __doc__ = f"""Lion on DTO-KD's balanced direction.

    Source: DTO-KD (ICLR 2026), Eq. 8-12; Lion: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023,
    Algorithm 2.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr, betas, weight_decay: as in the paper, which takes an `lr` 3 to 10 times smaller than AdamW's and a
            `weight_decay` as many times larger.
        maximize: reverses the combined direction.
        {_SHARED_ARGS}

    The state is that of timm's `Lion` ("exp_avg"), which `load_state_dict` takes. Each element of a parameter moves by
    `lr`, so `rescale` and `max_norm` change what the momentum remembers, not how far a step goes.

    Raises:
        ValueError: an `lr`, a beta or a `weight_decay` that is out of range.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> student = torch.nn.Linear(4, 2)
        >>> optimizer = dk.DTOLion(student.parameters(), lr=1e-4)
        >>> out = student(torch.ones(3, 4))
        >>> optimizer.backward([out.square().mean(), (out - 1).square().mean()])
        >>> optimizer.step()
    """

    _rule = RULES["lion"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        weighting: Weighting | None = None,
        max_norm: float | None = None,
        rescale: Rescale = "none",
        private: Private = "own",
        loss_floor: float = 1e-8,
        gram: Source | str | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        for name, value, below in (("lr", lr, None), ("weight_decay", weight_decay, None), *_named(betas)):
            good = is_number(value) and value >= 0 and (below is None or value < below)
            if not isinstance(value, Tensor) and not good:
                bound = "at least 0" if below is None else f"from 0 to less than {below}"
                raise ValueError(f"DTOLion: {name} is {value!r}; pass a number {bound}")
        self._set(weighting, max_norm, rescale, private, loss_floor, gram, backend, state_dtype, master_weights)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        torch.optim.Optimizer.__init__(self, params, defaults)


def _named(betas: tuple[float | Tensor, float | Tensor]) -> list[tuple[str, float | Tensor, int | None]]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"DTOLion: betas is {betas!r}; pass two numbers from 0 to less than 1, such as (0.9, 0.99)")
    return [(f"betas[{i}]", beta, 1) for i, beta in enumerate(betas)]
