"""DTO-KD in plain PyTorch: the definition of truth, and the fallback on any device.

The way of the data, one function an arrow::

    gradients --gram--> G --balance (min_norm_weights)--> coefficients --combine, update--> parameters

Equation numbers are those of Hayder et al., "DTO-KD: Dynamic Trade-off Optimization for Effective Knowledge
Distillation", ICLR 2026. Nothing here stalls the device: every decision is a tensor. Every kernel is compared
with this file, run in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import debug
from .asking import ask
from .types import Balance, GradientList, Options, Role

#: ||g_i - g_j||^2 below this share of ||g_i||^2 + ||g_j||^2 is rounding of the float64 Gram: the two are equal.
EQUAL = 1e-13
#: A loss that is clamped, as is advised, at 1e-7, to the rounding of float16.
AT_BOUND = 1.25e-7


def gram(grads: Sequence[GradientList]) -> Tensor:
    """Gram matrix G_ij = <g_i, g_j> of K gradients, each a list of tensors (Eq. 13-15).

    Args:
        grads: K lists of tensors of one shape position by position; None counts as zero.

    Returns:
        [K, K] float64 on the gradients' device.
    """
    device = next(g.device for row in grads for g in row if g is not None)
    total = torch.zeros(len(grads), len(grads), dtype=torch.float64, device=device)
    for position in zip(*grads, strict=True):
        for i, j in itertools.combinations_with_replacement(range(len(grads)), 2):
            if position[i] is not None and position[j] is not None:
                product = _inner_product(position[i], position[j]).to(device)
                total[i, j] += product
                if i != j:
                    total[j, i] += product
    return total


def _inner_product(a: Tensor, b: Tensor, chunk: int = 16384) -> Tensor:
    """<a, b> in float64, summed by chunks: torch splits longer sums among threads, and the bits would follow."""
    products = a.double().flatten() * b.double().flatten()
    return torch.nn.functional.pad(products, (0, -len(products) % chunk)).view(-1, chunk).sum(1).sum()


def min_norm_weights(gram: Tensor, clamp: bool = True, present: Tensor | None = None) -> Tensor:
    """Weights of the shortest convex combination d: argmin over the simplex of 1/2 pi^T G pi (Eq. 9, 10).

    The minimum lies inside some face of the simplex, where it is the projection of the origin on the affine
    hull of the face's gradients: solve every face, and of those without a negative weight keep the one that fulfils the
    condition of the minimum best, <g_i, d> >= ||d||^2 for all i. For K = 2 the faces are the two ends and the segment
    of Eq. 11 and 12.

    How exact: entries of a float64 Gram matrix err by a share of u = 1e-16 of ||g_i|| ||g_j||, so no solver finds
    ||d||^2 better than to u s^2 with s = sum_i pi_i ||g_i||. With e = `EQUAL`, whatever the ratio of the lengths:

        ||d||^2 <= min + e s^2,   and   <g_i, d> >= -e s ||g_i||   for all i,

    unless gradients are equal up to a share of sqrt(e) = 3e-7 of their length, or one lies as near to the affine hull
    of others: then d may be off by that share of s. Which weights give d is determined as far as the gradients are
    affinely independent.

    Args:
        gram: [K, K] symmetric, K <= 8.
        clamp: False drops the sign constraint: the affine solution, Eq. 11 as printed.
        present: [K] bool; the others get weight 0. Default: all.

    Returns:
        [K] float64, sums to 1 (all zero if nothing is present). Equal gradients share their weight equally.
    """
    K = len(gram)
    gram = gram.double()
    if present is None:
        present = torch.ones(K, dtype=torch.bool, device=gram.device)
    squares = gram.diagonal()
    floor = EQUAL * (squares[:, None] + squares[None, :])

    corners = subsets(K, gram.device)[1:]
    base = torch.where(corners, squares, torch.inf).argmin(1)  # [F]
    weights, solvable = _project_on_affine_hulls(gram, floor, corners, base)
    allowed = solvable & (present | ~corners).all(1)
    if clamp:
        allowed = allowed & (weights >= 0).all(1)
        value = _shortfalls(gram, weights, corners, base, present)
    else:  # the widest face that has a solution: all objectives, but for equal gradients
        value = -corners.sum(1).double()
    first_best = torch.where(allowed, value, torch.inf).argmin(0, keepdim=True)  # [1]: a scalar index would be read
    best = torch.where(allowed.any(), weights[first_best][0], 0.0)

    return share_equally(gram, best, present)


def share_equally(gram: Tensor, weights: Tensor, present: Tensor) -> Tensor:
    """Weights [K] of which equal gradients have the same, also those that are equal by way of others.

    Args:
        gram: [K, K] float64.
        weights: [K] float64.
        present: [K] bool; the others get weight 0.
    """
    squares = gram.diagonal()
    sums = squares[:, None] + squares[None, :]
    equal = (sums - 2 * gram <= EQUAL * sums) | torch.eye(len(gram), dtype=torch.bool, device=gram.device)
    group = (equal & present[:, None] & present[None, :]).double()
    for _ in range((len(gram) - 1).bit_length()):
        group = (group @ group > 0).double()
    return torch.where(present, group @ weights / group.sum(1).clamp(min=1), 0.0)


def subsets(K: int, device: torch.device) -> Tensor:
    """Sets of K objectives, or faces of the simplex: [2^K, K] bool, whether objective i is in the set number m."""
    numbers = torch.arange(1 << K, device=device)
    return (numbers[:, None] >> torch.arange(K, device=device)) & 1 > 0


def _project_on_affine_hulls(gram: Tensor, floor: Tensor, corners: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [F, K] of the points nearest the origin in the faces' affine hulls; [F] False where corners coincide.

    With a face's shortest gradient g_r as base and d_j = g_j - g_r the condition <d_j, g_r + sum_k t_k d_k> = 0 is the
    system D t = -<d_j, g_r>. For K = 2 this is Eq. 11: pi_2 = <g_1, g_1 - g_2> / ||g_1 - g_2||^2. Objectives outside
    the face have t_j = 0 as their equation. As g_r is the shortest, d_j is about as long as g_j: each entry of D errs
    by a share of its own size, and the pivots of elimination, which knows no units, are compared with their own size.
    """
    K = len(gram)
    is_base = base[:, None] == torch.arange(K, device=gram.device)
    others = corners & ~is_base
    to_base, square = gram[base], gram.diagonal()[base][:, None]  # <g_j, g_r>, ||g_r||^2
    D = gram - to_base[:, :, None] - to_base[:, None, :] + square[:, :, None]
    D = torch.where(others[:, :, None] & others[:, None, :], D, torch.eye(K, dtype=gram.dtype, device=gram.device))
    right = torch.where(others, square - to_base, 0.0)
    t, solvable = solve_systems(D, right[:, :, None], torch.where(others, floor[base], 0.0))
    t = t[:, :, 0]
    # one after the other: absent objectives then leave no trace in the rounding
    total = sum(t.unbind(1), torch.zeros_like(t[:, 0]))
    return torch.where(is_base, 1 - total[:, None], t), solvable


def _shortfalls(gram: Tensor, weights: Tensor, corners: Tensor, base: Tensor, present: Tensor) -> Tensor:
    """[F]: by how much the condition of the minimum is missed, the largest over the objectives, in units of ||g_i||.

    <g_i, d> is to be ||d||^2 for the corners of a face, and not less for the others. ||d||^2 is taken as <g_r, d> with
    the shortest corner g_r, which errs least. At the minimum only rounding is left, a share of sum_i pi_i ||g_i||: more
    than ||d||^2 itself would tell, as it errs by as much as it can, and grows with the square of what is missed.
    """
    products = sum(w[:, None] * row for w, row in zip(weights.unbind(1), gram, strict=True))  # [F, K], in this order
    missed = products.gather(1, base[:, None]) - products
    missed = torch.where(corners, missed.abs(), missed)
    return (missed * (1 / gram.diagonal().sqrt())).where(present & (missed > 0), 0.0).amax(1)


def solve_systems(systems: Tensor, right: Tensor, smallest: Tensor | float) -> tuple[Tensor, Tensor]:
    """Solutions of many small positive definite systems, by elimination, all at once.

    LAPACK would start threads for them, and wait for these where the machine is busy. Rows of the identity leave no
    trace in the other rows' rounding.

    Args:
        systems: [F, n, n].
        right: [F, n, R].
        smallest: [F, n] or a number; pivots that are not larger are rounding.

    Returns:
        [F, n, R], 0 where a pivot is rounding; and [F] bool, whether none is.
    """
    A, x = systems.clone(), right.clone()
    n = A.shape[1]
    for i in range(n):
        factors = A[:, i + 1 :, i] / A[:, i, i, None]
        A[:, i + 1 :] -= factors[:, :, None] * A[:, i, None, :]
        x[:, i + 1 :] -= factors[:, :, None] * x[:, i, None, :]
    for i in reversed(range(n)):
        x[:, i] /= A[:, i, i, None]
        x[:, :i] -= A[:, :i, i, None] * x[:, i, None, :]
    solvable = (A.diagonal(dim1=1, dim2=2) > smallest).all(1)
    return torch.where(solvable[:, None, None], x, 0.0), solvable


def balance(grams: Tensor, losses: Tensor, options: Options, weights: Tensor | None = None) -> Balance:
    """From the Gram matrix to the numbers that multiply the raw gradients.

    Log-gradients are g_i / L_i (Eq. 8), so their Gram matrix is G_ij / (L_i L_j) and log L is never
    differentiated: with u_i = 1 / max(L_i, loss_floor),

        pi = weighting(u_i u_j G_ij),   d = sum_i pi_i u_i g_i,   ||d||^2 = c^T G c  with  c_i = pi_i u_i.

    Args:
        grams: [3, K, K] float64, of raw gradients, for each `Role`: of the balanced parameters, the G of the formulas;
            of those that only some objectives reach, which take their own objectives' gradients at weight 1 (u_i with
            rescale "none"); and of those outside the balance, which take the sum of the gradients.
        losses: [K] values of the objectives.
        options: its weighting is a callable from (Gram [K, K], losses [K]), or from the Gram alone, to weights [K],
            whose attribute `log_gradients` (default True) is whether it weighs log-gradients or raw ones (u = 1).
            `max_norm` clips the combined direction to this norm, as `torch.nn.utils.clip_grad_norm_` does. `rescale`
            "sum" divides the coefficients by the sum of their sizes, so that the direction stays and the step's size
            is that of a weighted sum of the losses; "none" is the paper. `loss_floor` is the smallest loss divided by.
            `limit` is the largest element that a direction may have, before its update might overflow.
        weights: [K] float64, in place of those that the weighting would choose.

    Returns:
        The `Balance`.
    """
    grams = grams.double()
    gram = grams[Role.SHARED]
    losses = losses.to(gram.device, torch.float64)
    ones = torch.ones_like(losses)
    scale = 1 / losses.clamp(min=options.loss_floor) if options.log_gradients else ones

    present = gram.diagonal() > 0
    weights = torch.where(present, weigh(gram, losses, options) if weights is None else weights, 0.0)

    coefficients = weights * scale
    private_coefficients = scale
    if options.rescale == "sum":
        total = coefficients.abs().sum()  # some weightings give negative ones, whose sum may be as small as it likes
        coefficients = coefficients / torch.where(total > 0, total, 1.0)
        private_coefficients = ones
    table = torch.stack([coefficients, private_coefficients, ones])
    squares = [c @ G @ c for c, G in zip(table, grams, strict=True)]
    norm = (squares[0].clamp(min=0) + squares[1].clamp(min=0) + squares[2].clamp(min=0)).sqrt()
    if options.max_norm is not None:
        clip = (options.max_norm / (norm + 1e-6)).clamp(max=1)
        table = table * clip

    everything = grams.diagonal(dim1=1, dim2=2).sum(0)
    skipped = ~(norm.isfinite() & everything.isfinite().all() & losses.isfinite().all() & weights.isfinite().all())
    skipped = skipped | (everything == 0).all()
    # no element of a combination, nor of any part of it, has a larger square than `reach` (Cauchy and Schwarz)
    reach = len(gram) * (table * grams.diagonal(dim1=1, dim2=2) * table).sum(1)  # c * c alone may overflow
    bound = options.limit * options.limit
    skipped = skipped | ~((reach <= bound).all() & (table.abs() <= bound).all())
    if options.log_gradients:
        skipped = skipped | (losses <= 0).any()
    norms = gram.diagonal().sqrt()
    lengths = norms[:, None] * norms[None, :]
    return Balance(
        weights=weights,
        table=table,
        gram=gram,
        cosine=torch.where(lengths > 0, gram / torch.where(lengths > 0, lengths, 1.0), 0.0),
        norms=norms,
        norm=norm,
        vertex=(present & (weights == 0)).any(),
        skipped=skipped,
    )


def balance_before(
    grams: Tensor, losses_before: Tensor, losses: Tensor, squares: Tensor, roles: int, options: Options
) -> Balance:
    """The balance of gradients whose squares alone are known, as an earlier step's Gram matrices give it.

    Args:
        grams: [3, K, K] float64, of the earlier step.
        losses_before: [K] float64, of the earlier step: by these and its matrices weights are made.
        losses: [K] float64, of this step: by these they become coefficients.
        squares: [K] float64, the sum of the squares of each objective's gradient of this step. Where it is 0 the
            objective takes no part; where one is not finite, or all are 0, the step is skipped.
        roles: which parameters are updated, bit r for those of role r.
        options: as for `balance`; `limit` holds for any angles between the gradients.
    """
    grams = of_present(grams.double(), squares)
    weights = weigh(grams[Role.SHARED], losses_before, options)
    record = balance(grams, losses, options, weights)
    bounded = is_bounded(squares, record.table, roles, options.limit)
    return replace(record, skipped=record.skipped | ~bounded)


def of_present(grams: Tensor, squares: Tensor) -> Tensor:
    """Gram matrices [3, K, K], 0 for those objectives whose `squares` [K] are."""
    present = squares != 0
    return torch.where(present[:, None] & present[None, :], grams, 0.0)


def is_bounded(squares: Tensor, table: Tensor, roles: int, limit: float) -> Tensor:
    """Scalar bool: gradients of these squares are finite, not all 0, and no combination's element exceeds `limit`."""
    total = squares.sum()
    rows = [row for role, row in enumerate(table) if roles >> role & 1]
    reach = torch.stack(rows).abs().amax() * (len(squares) * total).sqrt()
    return (total > 0) & (total < torch.inf) & (reach <= limit)


def weigh(gram: Tensor, losses: Tensor, options: Options) -> Tensor:
    """Weights [K] float64 by any weighting from the raw Gram matrix; those of zero gradients do not count.

    Raises:
        ValueError: the weighting returned something else than a tensor [K].
    """
    weighting = options.weighting
    if options.log_gradients and options.needs_gram:
        scale = 1 / losses.clamp(min=options.loss_floor)
        gram = scale[:, None] * gram * scale[None, :]
    with debug.watch(weighting):
        weights = ask(weighting, gram, losses)
    if not isinstance(weights, Tensor) or weights.shape != (len(gram),):
        got = f"shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else f"a {type(weights).__name__}"
        raise ValueError(f"weighting {weighting!r} returned {got}, expected ({len(gram)},): one weight each")
    return weights.to(gram.device, torch.float64)


def at_bound(losses: Tensor, options: Options) -> Tensor:
    """[K] bool: objectives that count as without a gradient where a step does not measure this step's gradients.

    A loss that was clamped at its lower bound is a constant. Its gradient is zero, but a step of one backward pass
    does not see that beforehand, and with log-gradients such an objective would have the largest coefficient of all:
    with `rescale` "sum" it would take the whole sum, and training would stand still. So an objective whose loss is
    at most 1e-7 (or ten times `loss_floor`, where that is less) counts as one without a gradient until it rises again.
    Weightings of raw gradients don't divide by the loss, and their losses may have any sign: they are left as they are.
    """
    if not options.log_gradients:
        return torch.zeros_like(losses, dtype=torch.bool)
    return losses <= AT_BOUND * min(1.0, options.loss_floor / 1e-8)


def combine(grads: Sequence[GradientList], coefficients: Tensor, out: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The combination d = sum_i c_i g_i, tensor by tensor (Eq. 10), summed in float32 or better.

    Args:
        grads: K lists of tensors; None counts as zero, but each position has at least one tensor.
        coefficients: [K].
        out: tensors to write to; may be one of the K lists.

    Returns:
        A list of tensors with the gradients' shapes and dtypes.
    """
    combined = [_combine_one(position, coefficients) for position in zip(*grads, strict=True)]
    if out is None:
        return combined
    for target, value in zip(out, combined, strict=True):
        target.copy_(value)
    return list(out)


def _combine_one(position: Sequence[Tensor | None], coefficients: Tensor) -> Tensor:
    first = next(g for g in position if g is not None)
    opmath = torch.promote_types(first.dtype, torch.float32)
    total = torch.zeros_like(first, dtype=opmath)
    for gradient, coefficient in zip(position, coefficients.to(first.device, opmath), strict=True):
        if gradient is not None:
            total += coefficient * gradient.to(opmath)
    return total.to(first.dtype)


def adamw(
    p: Tensor,
    g: Tensor,
    state: Mapping[str, Tensor],
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
) -> dict[str, Tensor]:
    """AdamW (Loshchilov and Hutter, 2019), with torch's placement of the bias corrections.

    Args:
        p: the parameter.
        g: the direction d = sum_i c_i g_i that is descended.
        state: exp_avg, exp_avg_sq, with amsgrad max_exp_avg_sq, and step, how many steps the parameter has taken.
        lr, beta1, beta2, weight_decay, eps, amsgrad: as in torch.

    Returns:
        What the parameter ("param") and its state become.
    """
    t = state["step"] + 1
    m = state["exp_avg"].lerp(g, 1 - beta1)
    v = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
    correction1 = 1 - beta1 ** t.double()
    correction2 = 1 - beta2 ** t.double()
    largest = torch.maximum(state["max_exp_avg_sq"], v) if amsgrad else v
    denominator = largest.sqrt() / correction2.sqrt().to(p.device, p.dtype) + eps
    step_size = (lr / correction1).to(p.device, p.dtype)
    new = {"param": p * (1 - lr * weight_decay) - step_size * m / denominator, "exp_avg": m, "exp_avg_sq": v, "step": t}
    return new | ({"max_exp_avg_sq": largest} if amsgrad else {})


def sgd(
    p: Tensor,
    g: Tensor,
    state: Mapping[str, Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first: bool,
) -> dict[str, Tensor]:
    """SGD as torch does it.

    Args:
        p: the parameter.
        g: the direction that is descended.
        state: with momentum momentum_buffer.
        lr, momentum, dampening, weight_decay, nesterov: as in torch.
        first: the buffer holds nothing yet and starts as the direction itself, undampened.

    Returns:
        What the parameter ("param") and its state become.
    """
    if weight_decay != 0:  # 0 times an infinite parameter would be NaN
        g = g + weight_decay * p
    new = {}
    if momentum != 0:
        buffer = g if first else momentum * state["momentum_buffer"] + (1 - dampening) * g
        g = g + momentum * buffer if nesterov else buffer
        new["momentum_buffer"] = buffer
    return new | {"param": p - lr * g}


def lion(
    p: Tensor,
    g: Tensor,
    state: Mapping[str, Tensor],
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    weight_decay: float,
) -> dict[str, Tensor]:
    """Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, Algorithm 2).

    Args:
        p: the parameter.
        g: the direction that is descended.
        state: exp_avg.
        lr, beta1, beta2, weight_decay: as in the paper.

    Returns:
        What the parameter ("param") and its state become.
    """
    m = state["exp_avg"]
    return {"param": p * (1 - lr * weight_decay) - lr * m.lerp(g, 1 - beta1).sign(), "exp_avg": m.lerp(g, 1 - beta2)}


#: By name, as in `rules.RULES`: (parameter, direction, state, hyper-parameters) -> what they become.
UPDATES: dict[str, Callable[..., dict[str, Tensor]]] = {"adamw": adamw, "sgd": sgd, "lion": lion}


@torch.no_grad()
def update(
    rule: str,
    p: Tensor,
    grads: Sequence[Tensor | None],
    state: Mapping[str, Tensor],
    coefficients: Tensor,
    skipped: Tensor,
    numbers: Mapping[str, Any],
) -> None:
    """One rule on d = sum_i c_i g_i, in place; computed in float32 or better, changes nothing where `skipped`.

    Args:
        rule: a name in `UPDATES`.
        p: the parameter.
        grads: K gradients; None counts as zero.
        state: the rule's, and "master": a float32 copy of a half-precision parameter, which then is its rounding.
        coefficients: [K], what multiplies the raw gradients.
        skipped: scalar bool.
        numbers: the rule's hyper-parameters, and `maximize`, which turns the direction around.
    """
    opmath = torch.promote_types(p.dtype, torch.float32)
    others = {name: value for name, value in numbers.items() if name != "maximize"}
    coefficients = -coefficients if numbers["maximize"] else coefficients
    d = _combine_one([None if g is None else g.to(opmath) for g in grads], coefficients)
    held = {name: tensor if name == "step" else tensor.to(opmath) for name, tensor in state.items()}
    exact = state.get("master", p)
    new = UPDATES[rule](exact.to(opmath), d, held, **others)
    for name, value in new.items():
        targets = [exact, p] if name == "param" and exact is not p else [p if name == "param" else state[name]]
        for target in targets:
            target.copy_(torch.where(skipped.to(target.device), target, value.to(target.dtype)))
