"""The four operations between gradients and step, each usable alone: gram, min_norm_weights, balance, combine.

Here arguments are checked; `kernels` computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, kernels
from .checks import check_gram, check_lists, check_options, check_out, check_present, numbers
from .rows import GradientRows
from .types import Balance, GradientList, Rescale, Role, Weighting


def gram(grads: Sequence[GradientList], *, backend: str | None = None) -> Tensor:
    """Inner products of K gradients, each a list of tensors.

    Source: DTO-KD (ICLR 2026), Eq. 13-15.

    Args:
        grads: K lists of tensors, any shapes and float dtypes, the same position by position; None counts as zero.
        backend: the implementation to use; default: the best for the device.

    Returns:
        [K, K] float64 on the gradients' device (the first tensor's, if there are several), symmetric; exactly 0
        in the rows of an objective without gradients.

    Raises:
        TypeError, ValueError: lists of different lengths; tensors of different shapes, dtypes or devices at one
            position; sparse, complex or integer tensors; no tensor at all.

    Numerics: products and sums in float64, summed in a fixed order: the same bits for any number of threads.
    Effects: no host sync; mutates nothing; not differentiable.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> dk.gram([[torch.tensor([-4.0, 1.0, 1.0])], [torch.tensor([6.0, 1.0, 1.0])]])
        tensor([[ 18., -22.],
                [-22.,  38.]], dtype=torch.float64)
    """
    rows = _rows("gram", grads)
    if not rows.grads:
        raise ValueError("gram: grads holds no tensor; pass at least one gradient that is not None")
    with torch.no_grad():
        return kernels.gram(rows, len(grads), backend)[Role.SHARED]


def _rows(op: str, grads: Sequence[GradientList]) -> GradientRows:
    columns = check_lists(op, grads)
    return GradientRows.of(columns, [Role.SHARED] * len(columns))


def min_norm_weights(gram: Tensor, clamp: bool = True, *, present: Tensor | None = None) -> Tensor:
    """Weights of the shortest convex combination of K gradients.

    Source: DTO-KD (ICLR 2026), Eq. 9-12; for K up to 8 every face of the simplex is tried, and nothing iterates.

    Args:
        gram: [K, K], symmetric, any float dtype, 1 <= K <= 8.
        clamp: False lets weights leave the simplex: the affine solution, Eq. 11 as printed.
        present: [K] bool, objectives that may have a weight; default: all. (A zero gradient that is present takes
            all the weight, as it is the shortest; `balance` leaves it out.)

    Returns:
        [K] float64 on the Gram's device, sums to 1. Equal gradients share equally.

    Raises:
        TypeError, ValueError: `gram` is not [K, K] with 1 <= K <= 8; `present` is not [K] bool.

    Numerics: float64, whatever the ratio of the gradients' lengths. With s = sum_i pi_i ||g_i|| the combination's
        squared length is at most 1e-13 s^2 above the smallest, and no objective ascends by more than 1e-13 s ||g_i||:
        the precision of the Gram matrix. Gradients closer than a share of 3e-7 of their length count as equal, those as
        close to the affine hull of others as in it. Where gradients are nearly parallel the weights are
        ill-conditioned, the combination is not.

    Effects: no host sync; mutates nothing; not differentiable.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> dk.min_norm_weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
        tensor([0.6000, 0.4000], dtype=torch.float64)
    """
    K = check_gram("min_norm_weights", gram)
    if present is not None:
        check_present("min_norm_weights", present, K)
        present = present.to(gram.device)
    with torch.no_grad():
        return backends.select(gram.device).min_norm_weights(gram, clamp, present)


def balance(
    gram: Tensor,
    losses: Tensor | Sequence[float],
    weighting: Weighting | None = None,
    *,
    max_norm: float | None = None,
    rescale: Rescale = "none",
    loss_floor: float = 1e-8,
) -> Balance:
    """Weights and coefficients from the Gram matrix of the raw gradients.

    Source: DTO-KD (ICLR 2026), Eq. 8-12; rescaling as in FAMO (NeurIPS 2023), clipping as in torch.

    Args:
        gram: [K, K], of raw gradients (`gram`).
        losses: [K], the objectives' values.
        weighting: default `DTO()`; any callable (gram [K, K], losses [K]) -> weights [K] or gram -> weights. It gets
            the Gram of the log-gradients, or the raw one if it has `log_gradients = False`.
        max_norm: clip the combined direction to this norm.
        rescale: "none" (the paper) or "sum": coefficients divided by the sum of their sizes.
        loss_floor: gradients are divided by this in place of a smaller loss.

    Returns:
        A `Balance`. An objective whose gradient is exactly zero has weight 0.

    Raises:
        ValueError: shapes that do not fit, an unknown `rescale`, a `max_norm` or `loss_floor` that is not positive.

    Effects: no host sync; mutates nothing. A loss that is not positive, or anything not finite, sets `skipped`.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> b = dk.balance(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), torch.tensor([1.0, 1.0]))
        >>> b.weights, b.norm
        (tensor([0.6000, 0.4000], dtype=torch.float64), tensor(1.4142, dtype=torch.float64))
    """
    K = check_gram("balance", gram)
    losses = numbers("balance: losses", losses).to(gram.device)
    if losses.shape != (K,):
        raise ValueError(
            f"balance: losses has shape {tuple(losses.shape)}, expected ({K},) as gram is {K} x {K}; pass one for each "
            "objective"
        )
    options = check_options("balance", weighting, max_norm, rescale, loss_floor)
    with torch.no_grad():
        grams = kernels.by_role({Role.SHARED: gram.detach()}, losses)
        return kernels.balance(grams, losses.detach(), options)


def combine(
    grads: Sequence[GradientList],
    coefficients: Tensor | Sequence[float],
    out: Sequence[Tensor] | None = None,
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """The combined gradient sum_i c_i g_i, in one read of the gradients.

    Args:
        grads: K lists of tensors, the same shapes, dtypes and devices position by position; None counts as zero.
        coefficients: [K].
        out: tensors to write to, one per position; may be one of the K lists, for a combination in place.
        backend: the implementation to use; default: the best for the device.

    Returns:
        One tensor per position, in the gradients' dtype; `out` if given.

    Raises:
        TypeError, ValueError: as `gram`; also a position without any tensor, or an `out` that does not fit.

    Numerics: summed in float32, or float64 for float64 gradients.
    Effects: no host sync.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> dk.combine([[torch.tensor([-4.0, 1.0])], [torch.tensor([6.0, 1.0])]], [0.5, 0.25])
        [tensor([-0.5000,  0.7500])]
    """
    rows = _rows("combine", grads)
    positions = len(grads[0])
    if len(rows.layout.reach) != positions:
        empty = next(i for i in range(positions) if all(row[i] is None for row in grads))
        raise ValueError(f"combine: position {empty} is None in all grads; leave it out")
    if out is not None:
        check_out(grads, out)
    chosen = numbers("combine: coefficients", coefficients).to(torch.float64)
    if chosen.shape != (len(grads),):
        raise ValueError(
            f"combine: coefficients has shape {tuple(chosen.shape)}, expected ({len(grads)},); pass one for each "
            "list in grads"
        )
    with torch.no_grad():
        return kernels.combine(rows, chosen.expand(len(Role), -1), out, backend)
