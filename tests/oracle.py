"""A student with shared and private parameters, and what a balanced step must do to it, written out plainly.

Nothing here uses gradient sets, groups or kernels: gradients come from `torch.autograd.grad`, and every formula stands
as the docstrings state it. Only the K weights are taken from `min_norm_weights`, which has tests of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dtokd_kernels as dk

from . import tolerances


class Student(nn.Module):
    """A trunk that all objectives reach, a head and a projector that one each reaches, and a part that none does."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 5, dtype=dtype)
        self.scale = nn.Parameter(torch.empty((), dtype=dtype))
        self.head = nn.Linear(5, 3, dtype=dtype)
        self.projector = nn.Linear(5, 4, bias=False, dtype=dtype)
        self.unused = nn.Parameter(torch.empty(2, dtype=dtype))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.trunk(x)) * self.scale
        return self.head(hidden), self.projector(hidden)


def batch(step: int = 0, dtype: torch.dtype = torch.float64, n: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [n, 6] and the two targets [n, 3] and [n, 4]; another batch for each step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return tuple(torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype) for d in (6, 3, 4))


def losses_of(model: nn.Module, data: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    x, y, z = data
    task, distill = model(x)
    return {"task": (task - y).square().mean(), "distill": 5 * (distill - z).square().mean()}


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p: Tensor, gradient: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.gradient, ctx.like = gradient, torch.empty_like(p)
        return p.new_zeros(())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return torch.full_like(ctx.like, ctx.gradient), None


def nothing_with_gradient(p: Tensor, gradient: float) -> Tensor:
    """A scalar 0 whose gradient is `gradient` for every element of p: a finite loss with gradients that are not."""
    return _Nothing.apply(p, gradient)  # type: ignore[no-any-return]


class NoGradient(torch.autograd.Function):
    """x + sum(y) that has no gradient for y, though y requires one."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return x + y.sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad, None


def of_many_reaches(K: int) -> tuple[list[nn.Parameter], Callable[[], list[Tensor]]]:
    """K + 1 parameters and what makes K losses: i to K - 1 reach parameter i, all the last one."""
    parts = [nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(K)]
    shared = nn.Parameter(torch.randn(9, dtype=torch.float64))
    targets = torch.randn(K, 9, dtype=torch.float64)

    def losses() -> list[Tensor]:
        return [
            (shared - targets[i]).square().sum() + sum((i + 1) * (p - 1).square().sum() for p in parts[: i + 1])
            for i in range(K)
        ]

    return [*parts, shared], losses


@dataclass
class Expected:
    directions: list[Tensor | None]  # per parameter; None if nothing reaches it
    weights: Tensor
    norm: Tensor  # of all directions together, before clipping
    tolerance: float  # absolute, for each element of the directions


def balanced(
    losses: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    plain: Sequence[bool] | None = None,
    private: str = "own",
    rescale: str = "none",
    max_norm: float | None = None,
    loss_floor: float = 1e-8,
    log_gradients: bool = True,
    clamp: bool = True,
) -> Expected:
    """The direction of every parameter.

    plain: for each parameter, whether its group says `balance=False`: the sum of the gradients, outside the Gram.
    """
    K = len(losses)
    plain = [False] * len(params) if plain is None else plain
    grads = [torch.autograd.grad(loss, list(params), retain_graph=True, allow_unused=True) for loss in losses]
    reach = [[i for i in range(K) if grads[i][t] is not None] for t in range(len(params))]

    together = {i for t in range(len(params)) if not plain[t] and len(reach[t]) > 1 for i in reach[t]}
    anywhere = {i for t in range(len(params)) if not plain[t] for i in reach[t]}

    def role(t: int) -> str:
        if plain[t]:
            return "plain"
        return "private" if private == "own" and len(reach[t]) < len(together or anywhere) else "shared"

    values = torch.stack([loss.detach().double() for loss in losses])
    scale = 1 / values.clamp(min=loss_floor) if log_gradients else torch.ones(K, dtype=torch.float64)
    J = torch.stack(
        [
            torch.cat([
                (torch.zeros_like(p) if grads[i][t] is None else grads[i][t]).double().flatten()
                for t, p in enumerate(params)
                if role(t) == "shared"
            ])
            for i in range(K)
        ]
    )  # fmt: skip
    log_gradient = scale[:, None] * J
    gram = log_gradient @ log_gradient.T
    weights = dk.min_norm_weights(gram, clamp=clamp, present=gram.diagonal() > 0)
    coefficients = {"shared": weights * scale, "private": scale, "plain": torch.ones(K, dtype=torch.float64)}
    if rescale == "sum":
        coefficients["shared"] = coefficients["shared"] / coefficients["shared"].sum()
        coefficients["private"] = torch.ones(K, dtype=torch.float64)
    directions = [
        sum(coefficients[role(t)][i] * grads[i][t].double() for i in reach[t]) if reach[t] else None
        for t in range(len(params))
    ]
    present = [d for d in directions if d is not None]
    norm = torch.stack([d.square().sum() for d in present]).sum().sqrt()
    if max_norm is not None:
        clip = (max_norm / (norm + 1e-6)).clamp(max=1)
        directions = [None if d is None else d * clip for d in directions]
    # Sums of n products err by n u where `weights_bound` counts 4 u; 64 roundings more for the coefficients.
    size = max((scale[i] * grads[i][t]).abs().max().item() for t in range(len(params)) for i in reach[t])
    u = tolerances.unit_roundoff(torch.float64)
    n = J.shape[1]
    present_gram = gram[gram.diagonal() > 0][:, gram.diagonal() > 0]
    tolerance = (n * tolerances.weights_bound(present_gram) + 64 * u) * K * size
    return Expected(directions, weights, norm, tolerance)


def assert_directions(actual: Sequence[Tensor | None], expected: Expected, dtype: torch.dtype = torch.float64) -> None:
    """Directions as expected, as far as float64 gradients (or stored ones of `dtype`) allow."""
    for a, d in zip(actual, expected.directions, strict=True):
        assert (a is None) == (d is None)
        if a is not None:
            tolerance = expected.tolerance + 8 * tolerances.unit_roundoff(dtype) * d.abs().max().item()
            assert (a.double() - d).abs().max().item() <= tolerance
