"""From the Gram matrix to weights and coefficients: one program, everything in float64.

In a step it is the last to finish of those that made the matrix, so that it takes no launch of its own.
The steps are those of `reference.min_norm_weights` and `reference.balance`. Each face of the simplex has a lane of its
own, so that all of the at most 255 small systems are solved at once; after that an objective has a lane.
(ptxas spills nothing of a thread's system, but for 8 bytes at K = 7 on sm_100.)
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment, var-annotated"
# ruff: noqa: RUF005 (triton knows no starred tuples)

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..operations import values_size
from .gram import LANES, Member, partial_sums, sum_entry
from .tables import double, last_program

_EQUAL = tl.constexpr(reference.EQUAL)


def compiled(K: int) -> dict[str, Any]:
    """How the kernels are compiled: a thread for each face, so that registers hold its system."""
    return {"num_warps": max(1, 2**K // 32), "enable_fp_fusion": False}


def min_norm_weights(gram: Tensor, clamp: bool, present: Tensor | None) -> Tensor:
    """`reference.min_norm_weights` of a contiguous float64 [K, K]; one launch."""
    K = len(gram)
    out = torch.empty(K, dtype=torch.float64, device=gram.device)
    min_norm_kernel[(1,)](gram, present, out, K=K, OBJECTIVES=triton.next_power_of_2(K), CLAMP=clamp, **compiled(K))
    return out


def balance(grams: Tensor, losses: Tensor, weights: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    """`reference.balance` of contiguous float64 tensors, with DTO's weights unless they are given; one launch.

    Args:
        grams: [3, K, K], by role.
        losses: [K].
        weights: [K], or None.
        options: of a balance, as `operations` has them.

    Returns:
        values [values_size(K)] float64: weights, coefficients of shared, private and plain parameters, norms, cosine,
        norm; flags [2] bool: vertex, skipped.
    """
    sums = dict.fromkeys(("partials", "shared", "private", "plain", "ticket"))
    return _launch((1,), grams, losses, weights, options, **sums, **compiled(len(losses)))


def gram_balance(members: Sequence[Member], losses: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrices by role and what `balance` makes of them: a launch for each member, and one more.

    Returns:
        [3, K, K] float64, and as `balance`.
    """
    K = len(losses)
    partials = partial_sums(members, K)
    chunks = dict(zip(("shared", "private", "plain"), partials.chunks, strict=True))
    grams = torch.empty(len(chunks), K, K, dtype=torch.float64, device=partials.sums.device)
    sums = {**chunks, "partials": partials.sums, "ticket": partials.ticket}
    warps = {"num_warps": LANES // 32, "enable_fp_fusion": False}
    return grams, *_launch((K, K, len(chunks)), grams, losses, None, options, **sums, **warps)


#: The options of a balance as the kernel calls them, in the order of the operations.
_OPTIONS = ("LOG_GRADIENTS", "CLAMP", "RESCALE_SUM", "max_norm", "loss_floor", "limit")


def _launch(
    grid: tuple[int, ...], grams: Tensor, losses: Tensor, given: Tensor | None, options: Sequence[Any], **more: Any
) -> tuple[Tensor, Tensor]:
    K = len(losses)
    values = torch.empty(values_size(K), dtype=torch.float64, device=grams.device)
    flags = torch.empty(2, dtype=torch.bool, device=grams.device)
    sizes = {"K": K, "OBJECTIVES": triton.next_power_of_2(K), "LANES": LANES}
    more |= {"grams": grams, "losses": losses, "given": given, "values": values, "flags": flags}
    balance_kernel[grid](**dict(zip(_OPTIONS, options, strict=True)), **sizes, **more)
    return values, flags


@triton.jit
def min_norm_kernel(gram, present, out, K: tl.constexpr, OBJECTIVES: tl.constexpr, CLAMP: tl.constexpr):
    """Weights into out [K]; present: [K] bool, or None for all. One program."""
    bits = 0
    for i in tl.static_range(K):
        if present is None:
            bits |= 1 << i
        else:
            bits |= tl.load(present + i).to(tl.int32) << i
    weights = _min_norm(gram, None, 0.0, bits, K, OBJECTIVES, CLAMP, False)
    i = tl.arange(0, OBJECTIVES)
    tl.store(out + i, weights, mask=i < K)


@triton.jit(do_not_specialize=["shared", "private", "plain"])
def balance_kernel(
    partials,
    shared,
    private,
    plain,
    ticket,
    grams,
    losses,
    given,
    values,
    flags,
    max_norm: tl.float64,
    loss_floor: tl.float64,
    limit: tl.float64,
    K: tl.constexpr,
    OBJECTIVES: tl.constexpr,
    LOG_GRADIENTS: tl.constexpr,
    CLAMP: tl.constexpr,
    RESCALE_SUM: tl.constexpr,
    LANES: tl.constexpr,
):
    """Values and flags as `balance` describes them. One program; max_norm <= 0: no clipping.

    With partials: the Gram matrices as `gram_sum_kernel` makes them, by K x K x 3 programs, of which the last to finish
    makes the balance. ticket: 0 before.
    """
    if partials is not None:
        sum_entry(partials, shared, private, plain, grams, K, LANES)
        if last_program(ticket, K * K * 3):
            _write_balance(
                grams, losses, None, values, flags, max_norm, loss_floor, limit, K, OBJECTIVES, LOG_GRADIENTS, CLAMP,
                RESCALE_SUM,
            )  # fmt: skip
    else:
        _write_balance(
            grams, losses, given, values, flags, max_norm, loss_floor, limit, K, OBJECTIVES, LOG_GRADIENTS, CLAMP,
            RESCALE_SUM,
        )  # fmt: skip


@triton.jit
def _write_balance(
    grams,
    losses,
    given,
    values,
    flags,
    max_norm,
    loss_floor,
    limit,
    K: tl.constexpr,
    OBJECTIVES: tl.constexpr,
    LOG_GRADIENTS: tl.constexpr,
    CLAMP: tl.constexpr,
    RESCALE_SUM: tl.constexpr,
):
    """Make values and flags of the Gram matrices [3, K, K]."""
    private_gram, plain_gram = grams + K * K, grams + 2 * K * K
    i = tl.arange(0, OBJECTIVES)
    there = i < K
    loss = tl.load(losses + i, mask=there, other=1.0)
    squares = tl.load(grams + i * (K + 1), mask=there, other=0.0)
    scale = _scale(losses, tl.minimum(i, K - 1), loss_floor, LOG_GRADIENTS)
    if given is None:
        bits = tl.sum((squares > 0).to(tl.int32) << i)
        weights = _min_norm(grams, losses, loss_floor, bits, K, OBJECTIVES, CLAMP, LOG_GRADIENTS)
    else:
        weights = tl.load(given + i, mask=there, other=0.0)
    weights = tl.where(squares > 0, weights, 0.0)

    shared = weights * scale
    private = scale
    if RESCALE_SUM:
        total = tl.sum(tl.abs(shared))
        shared = shared / tl.where(total > 0, total, 1.0)
        private = tl.full([OBJECTIVES], 1.0, tl.float64)
    plain = tl.full([OBJECTIVES], 1.0, tl.float64)
    square = _squared_norm(grams, shared, K, OBJECTIVES)
    anything = squares
    # K times this: no element of a combination, nor of any part of it, has a larger square
    reach = tl.sum(shared * squares * shared)  # a large coefficient's square may overflow
    squares_there = tl.load(private_gram + i * (K + 1), mask=there, other=0.0)
    square += _squared_norm(private_gram, private, K, OBJECTIVES)
    anything += squares_there
    reach = tl.maximum(reach, tl.sum(private * squares_there * private))
    squares_there = tl.load(plain_gram + i * (K + 1), mask=there, other=0.0)
    square += _squared_norm(plain_gram, plain, K, OBJECTIVES)
    anything += squares_there
    reach = tl.maximum(reach, tl.sum(squares_there))
    norm = tl.sqrt(square)
    clip = double(max_norm) / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
    clip = tl.where((double(max_norm) > 0) & (clip < 1), clip, 1.0)

    largest = tl.where(there, tl.maximum(tl.abs(shared), tl.abs(private)), 0.0)
    bound = double(limit) * double(limit)
    fits = (K * reach * clip * clip <= bound) & (tl.max(largest) * clip <= bound)
    finite = _finite(loss) & _finite(weights) & _finite(anything)
    skipped = (
        (tl.min(finite.to(tl.int32)) == 0)
        | (fits == 0)
        | (_finite(norm) == 0)
        | (tl.max((anything != 0).to(tl.int32)) == 0)
    )
    if LOG_GRADIENTS:
        skipped = skipped | (tl.max((loss <= 0).to(tl.int32)) != 0)
    vertex = tl.max(((squares > 0) & (weights == 0)).to(tl.int32)) != 0

    norms = tl.sqrt(squares)
    lengths = norms[:, None] * norms[None, :]
    at = i[:, None] * K + i[None, :]
    within = there[:, None] & there[None, :]
    cosine = tl.load(grams + at, mask=within, other=0.0) / tl.where(lengths > 0, lengths, 1.0)
    tl.store(values + i, weights, mask=there)
    tl.store(values + K + i, shared * clip, mask=there)
    tl.store(values + 2 * K + i, private * clip, mask=there)
    tl.store(values + 3 * K + i, plain * clip, mask=there)
    tl.store(values + 4 * K + i, norms, mask=there)
    tl.store(values + 5 * K + at, tl.where(lengths > 0, cosine, 0.0), mask=within)
    tl.store(values + 5 * K + K * K, norm)
    tl.store(flags, vertex)
    tl.store(flags + 1, skipped)


@triton.jit
def _min_norm(
    gram,
    losses,
    loss_floor,
    present,
    K: tl.constexpr,
    OBJECTIVES: tl.constexpr,
    CLAMP: tl.constexpr,
    LOG_GRADIENTS: tl.constexpr,
):
    """Weights [OBJECTIVES] of the shortest convex combination (Eq. 9-12); present: bit i set if i may have a weight."""
    face = tl.arange(0, 1 << K)  # a lane's face: bit i set if corner i belongs to it
    base = tl.zeros([1 << K], tl.int32)  # the shortest corner, the first of equal ones
    shortest = tl.full([1 << K], float("inf"), tl.float64)
    corners = tl.zeros([1 << K], tl.int32)
    for i in tl.static_range(K - 1, -1, -1):
        square = _entry(gram, losses, i, i, loss_floor, K, LOG_GRADIENTS)
        shorter = ((face >> i) & 1 != 0) & (square <= shortest)
        base = tl.where(shorter, i, base)
        shortest = tl.where(shorter, square, shortest)
        corners += (face >> i) & 1

    # With d_j = g_j - g_base: D t = -<d_j, g_base>. Rows of corners outside the face are those of the unit matrix.
    # D is symmetric and stays so: row j holds columns j, j + 1, ...
    scale_of_base = _scale(losses, base, loss_floor, LOG_GRADIENTS)
    at_base = scale_of_base * tl.load(gram + base * K + base) * scale_of_base
    scales = ()
    to_base = ()
    member = ()
    for j in tl.static_range(K):
        scale = _scale(losses, j, loss_floor, LOG_GRADIENTS)
        scales = scales + (scale,)
        to_base = to_base + (scale * tl.load(gram + j * K + base) * scale_of_base,)
        member = member + (((face >> j) & 1 != 0) & (base != j),)
    D = ()
    t = ()
    floor = ()
    for j in tl.static_range(K):
        row = ()
        for k in tl.static_range(j, K):
            entry = scales[j] * tl.load(gram + j * K + k) * scales[k]
            if j == k:
                floor = floor + ((at_base + entry) * _EQUAL,)
            inside = entry - to_base[j] - to_base[k] + at_base
            row = row + (tl.where(member[j] & member[k], inside, 1.0 if j == k else 0.0),)
        D = D + (row,)
        t = t + (tl.where(member[j], at_base - to_base[j], 0.0),)

    # elimination, rows below the pivot; the matrix is positive definite or the face has no solution
    solvable = face != 0
    for i in tl.static_range(K):
        above = D[i][0] > floor[i]
        solvable = solvable & (above | (member[i] == 0))
        pivot = tl.where(above & member[i], D[i][0], 1.0)
        rows = ()
        rest = ()
        for k in tl.static_range(K):
            row = D[k]
            x = t[k]
            if k == i:
                row = (pivot,)
                for c in tl.static_range(i + 1, K):
                    row = row + (D[i][c - i],)
            if k > i:
                factor = D[i][k - i] / pivot
                row = ()
                for c in tl.static_range(k, K):
                    row = row + (D[k][c - k] - factor * D[i][c - i],)
                x = t[k] - factor * t[i]
            rows = rows + (row,)
            rest = rest + (x,)
        D = rows
        t = rest
    total = tl.zeros([1 << K], tl.float64)
    solved = ()  # last first
    for i in tl.static_range(K - 1, -1, -1):
        x = t[i]
        for c in tl.static_range(i + 1, K):
            x -= D[i][c - i] * solved[K - 1 - c]
        x = x / D[i][0]
        total += x
        solved = solved + (x,)

    weights = ()
    allowed = solvable & ((face & present) == face)
    for j in tl.static_range(K):
        weight = tl.where(member[j], solved[K - 1 - j], tl.where((face != 0) & (base == j), 1 - total, 0.0))
        weights = weights + (weight,)
        if CLAMP:
            allowed = allowed & (weight >= 0)
    if CLAMP:
        # by how much the condition of the minimum is missed: <g_i, d> = ||d||^2 for corners, not less for the others
        products = ()
        of_base = tl.zeros([1 << K], tl.float64)
        for j in tl.static_range(K):
            row = tl.zeros([1 << K], tl.float64)
            for k in tl.static_range(K):
                # volatile: read again, as registers that held the matrix until here would be spilled at K = 8
                row += scales[j] * tl.load(gram + j * K + k, volatile=True) * scales[k] * weights[k]
            products = products + (row,)
            of_base = tl.where(base == j, row, of_base)
        value = tl.zeros([1 << K], tl.float64)
        for j in tl.static_range(K):
            missed = of_base - products[j]
            missed = tl.where((face >> j) & 1 != 0, tl.abs(missed), missed)
            missed = missed * (1.0 / tl.sqrt(_entry(gram, losses, j, j, loss_floor, K, LOG_GRADIENTS)))
            value = tl.where(((present >> j) & 1 != 0) & (missed > value), missed, value)
    else:  # the widest face that has a solution
        value = -corners.to(tl.float64)
    value = tl.where(allowed & (value < float("inf")), value, float("inf"))
    lowest = tl.min(value)
    best = tl.min(tl.where((value == lowest) & (value < float("inf")), face, 1 << K))

    # equal gradients share, also those that are equal by way of others
    i = tl.arange(0, OBJECTIVES)[:, None]
    j = tl.arange(0, OBJECTIVES)[None, :]
    row, column = tl.minimum(i, K - 1), tl.minimum(j, K - 1)
    squares = _entry(gram, losses, row, row, loss_floor, K, LOG_GRADIENTS)
    squares += _entry(gram, losses, column, column, loss_floor, K, LOG_GRADIENTS)
    distances = squares - 2 * _entry(gram, losses, row, column, loss_floor, K, LOG_GRADIENTS)
    equal = ((distances <= squares * _EQUAL) | (i == j)) & (i < K) & (j < K)
    equal = equal & ((present >> i) & 1 != 0) & ((present >> j) & 1 != 0)
    leader_of_row = tl.min(tl.where(equal, j, K), axis=1)
    leader_of_column = tl.min(tl.where(equal, i, K), axis=0)
    for _ in tl.static_range(K - 2):  # on to the first of all
        first = tl.min(tl.where(equal, leader_of_column[None, :], K), axis=1)
        leader_of_column = tl.min(tl.where(equal, leader_of_row[:, None], K), axis=0)
        leader_of_row = first
    group = (leader_of_row[:, None] == leader_of_column[None, :]) & ((present >> j) & 1 != 0)
    chosen = tl.zeros([1, OBJECTIVES], tl.float64)
    for k in tl.static_range(K):
        chosen = tl.where(j == k, tl.sum(tl.where(face == best, weights[k], 0.0)), chosen)
    members = tl.sum(group.to(tl.int32), axis=1)
    shared = tl.sum(tl.where(group, chosen, 0.0), axis=1) / tl.maximum(members, 1).to(tl.float64)
    return tl.where((present >> tl.arange(0, OBJECTIVES)) & 1 != 0, shared, 0.0)


@triton.jit
def _entry(gram, losses, i, j, loss_floor, K: tl.constexpr, LOG_GRADIENTS: tl.constexpr):
    """Entry (i, j) of the Gram matrix that is balanced, of log-gradients or raw ones."""
    left = _scale(losses, i, loss_floor, LOG_GRADIENTS)
    return left * tl.load(gram + i * K + j) * _scale(losses, j, loss_floor, LOG_GRADIENTS)


@triton.jit
def _scale(losses, i, loss_floor, LOG_GRADIENTS: tl.constexpr):
    """What the gradient of objective i is multiplied with before it is weighed: 1 / L for log-gradients."""
    if LOG_GRADIENTS:
        return 1.0 / tl.maximum(tl.load(losses + i), double(loss_floor))
    else:
        return tl.full((), 1.0, tl.float64)


@triton.jit
def _squared_norm(gram, x, K: tl.constexpr, OBJECTIVES: tl.constexpr):
    """x^T G x, not below 0 by rounding; NaN stays."""
    i = tl.arange(0, OBJECTIVES)[:, None]
    j = tl.arange(0, OBJECTIVES)[None, :]
    G = tl.load(gram + i * K + j, mask=(i < K) & (j < K), other=0.0)
    square = tl.sum(tl.sum(x[:, None] * G * x[None, :], axis=1), axis=0)
    return tl.where(square < 0, 0.0, square)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")
