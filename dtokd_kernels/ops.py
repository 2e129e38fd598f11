"""The four operations between gradients and step, each usable alone: gram, min_norm_weights, balance, combine.

Here arguments are checked and tensors that may share a kernel call are grouped; `backends` says who computes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .checks import check_gram, check_lists, check_options, check_out, check_present, numbers
from .ranks import Ranks
from .trial import run_tried
from .types import Balance, GradientList, Group, Options, Rescale, Role, Update, Weighting, of_reach, spread


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
    groups = list(_group_positions("gram", grads).values())
    if not groups:
        raise ValueError("gram: grads holds no tensor; pass at least one gradient that is not None")
    with torch.no_grad():
        return gram_of_groups([group for group, _ in groups], len(grads), backend)


def gram_of_groups(groups: Iterable[Group], K: int, backend: str | None = None) -> Tensor:
    """Gram matrix over groups of tensors, unchecked: the optimizers' way into `gram`."""
    total: Tensor | None = None
    for reach, lists in groups:
        part = spread(backends.select(lists[0][0].device, backend).gram(lists), reach, K)
        total = part if total is None else total + part.to(total.device)
    assert total is not None
    return total


def solve(
    groups: Mapping[Role, Sequence[Group]],
    losses: Tensor,
    options: Options,
    scale: Tensor | None = None,
    ranks: Ranks | None = None,
) -> Balance:
    """Gram matrices and balance of groups of tensors, unchecked: the optimizers' way into `gram` and `balance`.

    A backend with a function `gram_balance` takes both at once, if all tensors are on one device.

    Args:
        groups: the gradients by role.
        losses: [K].
        options: of the balance.
        scale: scalar, what the gradients were multiplied with (the scale of a GradScaler); None for 1. The balance is
            that of the gradients without it.
        ranks: the other processes that train the same model; None if there are none.
    """
    devices = {lists[0][0].device for same_role in groups.values() for _, lists in same_role}
    module = backends.select(next(iter(devices), losses.device), options.backend)
    sharded = ranks is not None and ranks.shards
    if len(devices) == 1 and scale is None and not sharded and hasattr(module, "gram_balance"):
        return module.gram_balance(groups, losses, options)
    grams = unscaled(grams_by_role(groups, losses, options.backend), scale)
    if ranks is not None:
        grams, losses = ranks.total(grams, losses)
    return balance_grams(grams, losses, options)


def grams_by_role(groups: Mapping[Role, Sequence[Group]], losses: Tensor, backend: str | None) -> Tensor:
    """The Gram matrices [3, K, K] float64, one for each `Role`; on the losses' device if there are no gradients."""
    K = len(losses)
    return by_role({role: gram_of_groups(same, K, backend) for role, same in groups.items()}, losses)


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


def balance_grams(grams: Tensor, losses: Tensor, options: Options) -> Balance:
    """The balance of Gram matrices [3, K, K] by role, unchecked; other arguments as `solve`."""
    return backends.select(grams.device, options.backend).balance(grams, losses, options)


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
        what the Gram matrix knows. Gradients closer than a share of 3e-7 of their length count as equal, those as close
        to the affine hull of others as in it. Where gradients are nearly parallel the weights are ill-conditioned, the
        combination is not.

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
    """From the Gram matrix of the raw gradients to what multiplies them.

    Source: DTO-KD (ICLR 2026), Eq. 8-12; rescaling as in FAMO (NeurIPS 2023), clipping as in torch.

    Args:
        gram: [K, K], of raw gradients (`gram`).
        losses: [K], the objectives' values.
        weighting: default `DTO()`; any callable (gram [K, K], losses [K]) -> weights [K] or gram -> weights. It gets
            the Gram of the log-gradients, or the raw one if it has `log_gradients = False`.
        max_norm: clip the combined direction to this norm.
        rescale: "none" (the paper) or "sum": coefficients divided by the sum of their sizes.
        loss_floor: smallest loss divided by.

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
        return balance_grams(by_role({Role.SHARED: gram.detach()}, losses), losses.detach(), options)


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
    groups = _group_positions("combine", grads)
    positions = len(grads[0])
    covered = sum(len(where) for _, where in groups.values())
    if covered != positions:
        empty = next(i for i in range(positions) if all(row[i] is None for row in grads))
        raise ValueError(f"combine: position {empty} is None in all grads; leave it out")
    result: list[Any] = [None] * positions
    if out is not None:
        check_out(grads, out)
        result = list(out)
    for (reach, lists), where in groups.values():
        device = lists[0][0].device
        chosen = numbers("combine: coefficients", coefficients).to(device, torch.float64)
        if chosen.shape != (len(grads),):
            raise ValueError(
                f"combine: coefficients has shape {tuple(chosen.shape)}, expected ({len(grads)},); pass one for each "
                "list in grads"
            )
        targets = None if out is None else [out[i] for i in where]
        with torch.no_grad():
            values = backends.select(device, backend).combine(lists, of_reach(chosen, reach), targets)
        for i, value in zip(where, values, strict=True):
            result[i] = value
    return result


def runs_steps(device: torch.device, options: Options) -> bool:
    """Whether the backend has a function `run_step`, which may do `solve` and `run_updates` at once."""
    return hasattr(backends.select(device, options.backend), "run_step")


def run_step(updates: Sequence[Update], losses: Tensor, options: Options) -> Balance | None:
    """`solve` and `run_updates` at once, where `runs_steps`.

    Args:
        updates: all of the step, in the order in which memory should be walked.
        losses: [K].
        options: of the balance.

    Returns:
        The balance; None, with nothing changed, if the two have to be called one by one.
    """
    devices = {update.params[0].device for update in updates}
    if len(devices) != 1:
        return None
    module: Any = backends.select(devices.pop(), options.backend)
    balance: Balance | None = module.run_step(updates, losses, options)
    return balance


def run_updates(
    updates: Sequence[Update], table: Tensor, skipped: Tensor, options: Options, ranks: Ranks | None = None
) -> Tensor:
    """Update parameters and state in place, or change nothing where `skipped`.

    Args:
        updates: in the order in which memory should be walked.
        table: [3, S] float64, what multiplies the S gradient sets, by `Role`.
        skipped: scalar bool.
        options: of the balance.
        ranks: the other processes that train the same model; None if there are none.

    Returns:
        Scalar bool on the device of `skipped`: it, or numbers that the updates would have written are not finite, so
        that nothing has changed (`trial.run_tried`).

    Effects: no host sync.
    """

    def run(some: Sequence[Update], skip: Tensor) -> None:
        for same, there, skip_there in _by_device(some, table, skip):
            backends.select(there.device, options.backend).run_updates(same, there, skip_there)

    return run_tried(updates, skipped, ranks, run)


def measure_and_update(
    updates: Sequence[Update], table: Tensor, skipped: Tensor, options: Options, ranks: Ranks | None = None
) -> tuple[Tensor, Tensor]:
    """`run_updates`, and the Gram matrices of the gradients that it reads, from the same pass over them.

    Returns:
        [3, K, K] float64 on the table's device, one matrix for each `Role`; also where nothing was updated. And as
        `run_updates`.
    """
    K = table.shape[1]
    grams = [table.new_zeros(len(Role), K, K)]

    def run(some: Sequence[Update], skip: Tensor) -> None:
        for same, there, skip_there in _by_device(some, table, skip):
            module = backends.select(there.device, options.backend)
            grams.append(module.measure_and_update(same, there, skip_there).to(table.device))

    skipped = run_tried(updates, skipped, ranks, run)
    return functools.reduce(Tensor.add, grams[1:] or grams), skipped


def _by_device(
    updates: Iterable[Update], table: Tensor, skipped: Tensor
) -> Iterator[tuple[list[Update], Tensor, Tensor]]:
    """The updates of each device, in their order, with the table and `skipped` there."""
    by_device: dict[torch.device, list[Update]] = {}
    for update in updates:
        by_device.setdefault(update.params[0].device, []).append(update)
    for device, same in by_device.items():
        yield same, table.to(device), skipped.to(device)


def _group_positions(op: str, grads: Sequence[GradientList]) -> dict[Any, tuple[Group, list[int]]]:
    return group_rows(check_lists(op, grads))


def group_rows(rows: Iterable[Sequence[Tensor | None]]) -> dict[Any, tuple[Group, list[int]]]:
    """Group positions by which objectives reach them, device and dtype: (reach, lists) and their indices."""
    groups: dict[Any, tuple[Group, list[int]]] = {}
    for t, row in enumerate(rows):
        reach = tuple([i for i, g in enumerate(row) if g is not None])
        if not reach:
            continue
        first = row[reach[0]]
        assert first is not None
        key = (reach, first.device, first.dtype)
        if key not in groups:
            groups[key] = ((reach, [[] for _ in reach]), [])
        (_, lists), where = groups[key]
        for values, i in zip(lists, reach, strict=True):
            values.append(row[i])  # type: ignore[arg-type]
        where.append(t)
    return groups
