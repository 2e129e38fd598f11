"""Optimizers that are tried here and are no part of the package, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

import dtokd_kernels as dk
from dtokd_kernels.weighting import DTO, Fixed


class Trial(AdamW):
    """What `students.train` needs of an optimizer; K gradients of each step are kept for `step`.

    Args:
        params: of the student and its projectors. A parameter that a loss does not reach has a zero gradient in it.
        max_norm: clips the combined gradient.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float, max_norm: float) -> None:
        super().__init__(list(params), lr=lr, weight_decay=weight_decay)
        self._max_norm = max_norm
        self.balance: dk.Balance | None = None

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Gradients and weights of the losses, and the clipped sum in `.grad`."""
        params: list[Tensor] = self.param_groups[0]["params"]
        rows = [
            torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True, materialize_grads=True)
            for loss in losses.values()
        ]
        values = torch.stack(list(losses.values())).detach()
        self.balance = self.weigh(rows, values)
        self.rows = [[c.to(g.dtype) * g for g in row] for c, row in zip(self.balance.coefficients, rows, strict=True)]
        for p, *column in zip(params, *self.rows, strict=True):
            p.grad = torch.stack(column).sum(0)

    def weigh(self, rows: list[tuple[Tensor, ...]], losses: Tensor) -> dk.Balance:
        """The weights of a step."""
        raise NotImplementedError


class AdamMetric(Trial):
    """Exact DTO with the Gram matrix in AdamW's metric: g_i^T diag(1 / (sqrt(v) + eps)) g_j.

    Source: MAdam (arXiv 2606.03904), after its abstract.
    """

    def weigh(self, rows: list[tuple[Tensor, ...]], losses: Tensor) -> dk.Balance:
        """DTO's weights in that metric; clipping is of the direction's Euclidean norm."""
        plain = dk.gram(rows)
        weights = DTO()(self._gram(rows) / (losses[:, None] * losses), losses)
        return dk.balance(plain, losses, lambda gram: weights, max_norm=self._max_norm)

    def _gram(self, rows: list[tuple[Tensor, ...]]) -> Tensor:
        group = self.param_groups[0]
        roots = []
        for p in group["params"]:
            if p not in self.state:
                return dk.gram(rows)
            state = self.state[p]
            second = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            roots.append((second.sqrt() + group["eps"]).rsqrt())
        return dk.gram([[g * root for g, root in zip(row, roots, strict=True)] for row in rows])


class OwnMomentum(Trial):
    """Half task, half distillation, each with a momentum of its own: AdamW's first moment decays by 0.9 -+ `delta`.

    The second moment is that of the sum, as in AdamW. Source: DOT (Zhao et al., ICCV 2023), Algorithm 1, which has SGD:
    less momentum for the task's gradient, more for distillation's; DeepKD (arXiv 2505.15133) does the same with three.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, delta: float, **options: Any) -> None:
        super().__init__(params, **options)
        self._delta = delta

    def weigh(self, rows: list[tuple[Tensor, ...]], losses: Tensor) -> dk.Balance:
        """Equal weights of the raw gradients."""
        K = len(rows)
        return dk.balance(dk.gram(rows), losses, Fixed([0.5, *[0.5 / (K - 1)] * (K - 1)]), max_norm=self._max_norm)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """AdamW's update with the sum of the objectives' first moments."""
        group = self.param_groups[0]
        beta, beta2 = group["betas"]
        decays = [beta - self._delta, *[beta + self._delta] * (len(self.rows) - 1)]
        for p, *column in zip(group["params"], *self.rows, strict=True):
            state = self.state[p]
            if not state:
                state.update(step=0, firsts=[torch.zeros_like(p) for _ in column], second=torch.zeros_like(p))
            state["step"] += 1
            t = state["step"]
            state["second"].lerp_(p.grad.square(), 1 - beta2)
            for first, g, decay in zip(state["firsts"], column, decays, strict=True):
                first.lerp_(g, 1 - decay)
            moments = [first / (1 - decay**t) for first, decay in zip(state["firsts"], decays, strict=True)]
            scale = (state["second"] / (1 - beta2**t)).sqrt() + group["eps"]
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(group["lr"] * torch.stack(moments).sum(0) / scale)
