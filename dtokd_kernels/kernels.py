"""Rows of gradients -> Gram matrices -> balance or combination, by the implementations of their devices; unchecked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import backends
from .implementations import Implementation
from .ranks import Ranks
from .rows import DTYPES, GradientRows
from .types import Balance, Options, Role


def _implementation(rows: GradientRows, backend: str | None) -> Implementation:
    """For rows on one device; the reference for those of a dtype that kernels do not know."""
    first = rows.grads[0]
    return backends.select(first.device, backend) if first.dtype in DTYPES else backends.REFERENCE


def gram(rows: GradientRows, K: int, backend: str | None = None, without: torch.device | None = None) -> Tensor:
    """The Gram matrices [3, K, K] float64, one for each `Role`.

    Args:
        rows: the gradients; none give zeros.
        K: how many objectives there are.
        backend: the implementation to use; None: the best for each device.
        without: the device of the matrices if there are no gradients.
    """
    total: Tensor | None = None
    if rows.grads:
        for _, some in rows.apart():
            part = _implementation(some, backend).gram(some, K)
            total = part if total is None else total + part.to(total.device)
    if total is None:
        return torch.zeros(len(Role), K, K, dtype=torch.float64, device=without)
    return total


def by_role(grams: Mapping[Role, Tensor], losses: Tensor) -> Tensor:
    """[3, K, K] float64 of the matrices [K, K] of some roles."""
    K = len(losses)
    device = next((gram.device for gram in grams.values()), losses.device)
    whole = torch.zeros(len(Role), K, K, dtype=torch.float64, device=device)
    for role, gram in grams.items():
        whole[role] = gram
    return whole


def unscaled(grams: Tensor, scale: Tensor | None) -> Tensor:
    """Gram matrices as they would be if the gradients had not been multiplied with `scale` (scalar; None for 1)."""
    return grams if scale is None else grams / scale.to(grams.device).square()


def balance(grams: Tensor, losses: Tensor, options: Options, weights: Tensor | None = None) -> Balance:
    """The balance of Gram matrices [3, K, K] by role; other arguments as `solve` and `reference.balance`."""
    return backends.select(grams.device, options.backend).balance(grams, losses, options, weights)


def balance_before(
    grams: Tensor, losses_before: Tensor, losses: Tensor, squares: Tensor, roles: int, options: Options
) -> Balance:
    """The balance as an earlier step's Gram matrices give it; see `reference.balance_before`. All on one device."""
    implementation = backends.select(grams.device, options.backend)
    return implementation.balance_before(grams, losses_before, losses, squares, roles, options)


def solve(
    rows: GradientRows, losses: Tensor, options: Options, scale: Tensor | None = None, ranks: Ranks | None = None
) -> Balance:
    """Gram matrices and balance of gradients, in as few launches as the implementation can.

    Args:
        rows: the gradients.
        losses: [K].
        options: of the balance.
        scale: scalar, what the gradients were multiplied with (the scale of a GradScaler); None for 1. The balance is
            that of the gradients without it.
        ranks: the other processes that train the same model; None if there are none.
    """
    whole = ranks is None or not ranks.shards
    if rows.grads and rows.layout.device is not None and scale is None and whole:
        return _implementation(rows, options.backend).gram_balance(rows, losses, options)
    grams = unscaled(gram(rows, len(losses), options.backend, losses.device), scale)
    if ranks is not None:
        grams, losses = ranks.total(grams, losses)
    return balance(grams, losses, options)


def combine(
    rows: GradientRows, coefficients: Tensor, out: Sequence[Tensor] | None = None, backend: str | None = None
) -> list[Tensor]:
    """The combination sum_i c_i g_i of each row.

    Args:
        rows: the gradients.
        coefficients: [3, K], by role.
        out: where to put them; may be gradients of their rows. Default: new tensors.
        backend: the implementation to use; None: the best for each device.
    """
    targets = [torch.empty_like(column[0]) for column in rows.columns()] if out is None else list(out)
    if rows.grads:
        for places, some in rows.apart():
            chosen = [targets[t] for t in places]
            _implementation(some, backend).combine(chosen, some, coefficients.to(chosen[0].device))
    return targets
