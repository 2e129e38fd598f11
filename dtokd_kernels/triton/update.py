"""What is done with the combined gradient d = sum_i c_i g_i: stored, or descended by an update rule.

The formulas are those of `csrc/include/dtokd/update_rules.h`, fused multiply-adds included; the compiler may fuse no
others, so neither the number of warps nor a version of it changes a bit. Computed in float32, or float64 for float64
tensors; numbers of a parameter group arrive as float64 and are rounded once, here. Coefficients and `skipped` are
read by the kernels, so that nothing waits for them; a gradient whose coefficient is exactly 0 is not read. Chunks are
walked last first, as the Gram pass has read the last gradients most recently, and parameters and states are marked to
leave the cache first.

With `partials` the kernel also takes the Gram matrix of the gradients: it reads all of them, of a skipped step too,
and adds as NOTE [Sums] in `gram` says. So it has as many warps as the Gram kernel.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment, var-annotated"
# ruff: noqa: RUF005, SIM102, SIM300 (triton knows no starred tuples, and its `and` takes a ticket in any case;
# constants are in capitals, as in all of triton)

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rules import RULES, Rule
from .gram import LANES, add_products, added_up, columns, no_sums, objectives, store_sums
from .tables import (
    CHUNK,
    DTYPES,
    VECTOR_BYTES,
    Table,
    find,
    last_program,
    numbers_of,
    pointer_to,
    rounded,
    table_of,
)

#: Warps of a program, and accesses of 16 bytes to each list in one pass of a kernel's loop.
NUM_WARPS = LANES // 32
VECTORS = 1
#: Counters counted at a time: no fewer than a program's threads, of which the rest would read a counter beside the one
#: that writes it.
COUNT_BLOCK = tl.constexpr(512)
SUM_LANES = tl.constexpr(LANES)
#: How the update kernel is compiled.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
#: The rule that stores the combined gradient; the others are those of `rules`.
COMBINE = "combine"
COMBINING = tl.constexpr(COMBINE)
#: Hyper-parameters that the kernel is specialized for: SPECIAL in the kernel, and amsgrad by the number of states.
SPECIAL = ("maximize", "nesterov", "first")
FLAGS = (*SPECIAL, "amsgrad")


def constants(dtype: torch.dtype) -> dict[str, Any]:
    """What the update kernel is specialized for, for tensors of a dtype."""
    return {
        "DTYPE": DTYPES[dtype],
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "CHUNK": CHUNK,
        "BLOCK": 32 * NUM_WARPS * VECTORS * VECTOR_BYTES // dtype.itemsize,
    }


class Descent(NamedTuple):
    """What parameters of one or several groups descend, together in one launch.

    Attributes:
        params: T parameters.
        grads: for each objective in `reach` a list of gradients that fit them.
        groups: [T], the parameter group of each.
        reach: bit i set if objective i has a gradient here.
        table: [3, K] float64 on their device, the coefficients of all roles (or of the first only).
        skipped: bool on their device.
        tensor_lr: the learning rate of all groups, if it is on their device.
        numbers: of each group, one after the other: the role, and those of the rule in its order.
    """

    params: Sequence[Tensor]
    grads: Sequence[Sequence[Tensor]]
    groups: tuple[int, ...]
    reach: int
    table: Tensor
    skipped: Tensor
    tensor_lr: Tensor | None
    numbers: tuple[float, ...]


def combine(out: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], reach: int, coefficients: Tensor) -> None:
    """Store sum_i c_i g_i in `out`, which may be one of the lists. One launch.

    Args:
        out: T tensors.
        grads: for each objective in `reach` a list of T tensors that fit them.
        reach: bit i set if objective i has a gradient here.
        coefficients: [K] float64 on their device.
    """
    unused = dict.fromkeys(("skipped", "ticket", "numbers", "tensor_lr", "partials"))
    flags = dict.fromkeys(map(str.upper, SPECIAL), False)
    table, K = table_of([*grads, out]), len(coefficients)
    _launch(table, out[0].dtype, coefficients, **unused, K=K, REACH=reach, RULE=COMBINE, STATES=0, **flags)


def step(
    rule: Rule,
    descent: Descent,
    states: Sequence[Sequence[Tensor]],
    numbers: Mapping[str, float],
    ticket: Tensor,
    measured: bool = False,
) -> Tensor | None:
    """One step by a rule, one launch; the last program to finish counts the steps of all tensors.

    Args:
        rule: the update rule.
        descent: what it descends; of one role, if `measured`.
        states: a list that fits the parameters for each state that they have, in the rule's order; then their float32
            counters of steps, if the rule counts them.
        numbers: the hyper-parameters by name; the flags are those of all groups.
        ticket: int32, 0 before and after.
        measured: return the Gram matrices [3, K, K] of the gradients, from the same pass and one launch more.
    """
    counters: Sequence[Tensor] = ()
    if rule.counts_steps:
        *states, counters = states
    table = table_of([*descent.grads, descent.params, *states], counters, descent.groups)
    K, sums = descent.table.shape[1], None
    if measured:
        shape = K * (K + 1) // 2 * max(table.chunks, 1)
        sums = torch.empty(shape, dtype=torch.float64, device=descent.table.device)
    _launch(
        table,
        descent.params[0].dtype,
        descent.table,
        skipped=descent.skipped,
        ticket=ticket if rule.counts_steps else None,
        numbers=numbers_of(descent.numbers, descent.params),
        tensor_lr=descent.tensor_lr,
        partials=sums,
        K=K,
        REACH=descent.reach,
        RULE=rule.name,
        STATES=len(states),
        **{name.upper(): bool(numbers.get(name)) for name in SPECIAL},
    )
    if sums is None:
        return None
    of_role = [0, 0, 0]
    of_role[int(descent.numbers[0])] = table.chunks
    return added_up(sums, of_role, K)


def _launch(table: Table, dtype: torch.dtype, coefficients: Tensor, **arguments: Any) -> None:
    """One program per chunk of a table whose tensors are of this dtype; one if all are empty."""
    chunks = max(table.chunks, 1)
    arguments |= {**constants(dtype), **OPTIONS}
    update_kernel[(chunks,)](table.numbers, table.tensors, coefficients, chunks=chunks, **arguments)


@triton.jit(do_not_specialize=["T", "chunks"])
def update_kernel(
    table,
    T,
    coefficients,
    skipped,
    ticket,
    numbers,
    tensor_lr,
    partials,
    chunks,
    K: tl.constexpr,
    REACH: tl.constexpr,
    RULE: tl.constexpr,
    STATES: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combine gradients, and store that or descend it; one program per chunk.

    Rows of the table: R gradients; what is combined into, or the parameter, its states, step counters if there is a
    ticket, group. Reads R + 1 + STATES times CHUNK elements, writes 1 + STATES times; to combine, R and 1.
    ticket: 0 before and after. partials: None, or [K(K+1)/2, chunks], into whose column go the chunk's sums.
    """
    MEASURE: tl.constexpr = partials is not None
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    t, offset, left, full = find(table, T, chunk, CHUNK)
    steps = table + (4 + objectives(REACH) + STATES) * T
    scalars = ()
    live = tl.full((), 1, tl.int1)
    if RULE != COMBINING:
        group = steps if ticket is None else steps + T
        numbers += tl.load(group + t) * numbers_of_group(RULE)
        coefficients += tl.load(numbers).to(tl.int32) * K  # of the group's role
        rate = tl.load(numbers + 1) if tensor_lr is None else tl.load(tensor_lr).to(tl.float64)
        scalars = _scalars(numbers, rate, steps + t, COMPUTE, RULE)
        live = tl.load(skipped) == 0
    if MEASURE:
        partials += chunk
    if live | MEASURE:
        if full:
            _descend(
                table, T, t, offset, left, coefficients, scalars, live, partials, chunks, K, REACH, RULE, STATES,
                MAXIMIZE, NESTEROV, FIRST, DTYPE, COMPUTE, CHUNK, BLOCK, True,
            )  # fmt: skip
        else:
            # fewer elements at a time: these are few, and their path should cost the other no registers
            _descend(
                table, T, t, offset, left, coefficients, scalars, live, partials, chunks, K, REACH, RULE, STATES,
                MAXIMIZE, NESTEROV, FIRST, DTYPE, COMPUTE, CHUNK, BLOCK if MEASURE else BLOCK // 4, False,
            )  # fmt: skip
    if ticket is not None:
        if live:
            if last_program(ticket, tl.num_programs(0)):  # all have read the counters
                tl.store(ticket, 0)
                _count_up(steps, T)


@triton.constexpr_function
def numbers_of_group(rule):
    """How many numbers a group has: the role, and those of the rule."""
    return 1 + len(RULES[rule].numbers)


@triton.jit
def _count_up(steps, T):
    """Add 1 to the T counters at these addresses."""
    start = 0
    while start < T:
        t = start + tl.arange(0, COUNT_BLOCK)
        step = tl.load(steps + t, mask=t < T, other=0).to(tl.pointer_type(tl.float32))
        tl.store(step, tl.load(step, mask=t < T, other=0.0) + 1, mask=t < T)
        start += COUNT_BLOCK


@triton.jit
def _descend(
    table,
    T,
    t,
    offset,
    left,
    coefficients,
    scalars,
    live,
    partials,
    chunks,
    K: tl.constexpr,
    REACH: tl.constexpr,
    RULE: tl.constexpr,
    STATES: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """The chunk's elements, BLOCK at a time."""
    R: tl.constexpr = objectives(REACH)
    MEASURE: tl.constexpr = partials is not None
    grads, factors, read = _gradients(table, T, t, offset, coefficients, REACH, DTYPE, COMPUTE, CHUNK, FULL, MAXIMIZE)
    written = ()
    for row in tl.static_range(1 + STATES):
        written = written + (pointer_to(table, T, t, R + row, offset, DTYPE, CHUNK, FULL),)
    if MEASURE:
        sums = no_sums(R, SUM_LANES)
    STRIDE: tl.constexpr = stride(MEASURE, FULL, BLOCK)
    start = 0
    end = CHUNK if FULL else tl.cdiv(tl.minimum(left, CHUNK), BLOCK) * BLOCK
    while start < end:
        at = _places(start, STRIDE, BLOCK)
        if MEASURE:
            d, sums = _combined_and_measured(grads, factors, read, at, left, sums, R, COMPUTE, BLOCK, FULL)
        else:
            d = _combined(grads, factors, read, at, left, R, COMPUTE, FULL)
        values = ()  # what the rule has no use for the compiler does not read
        for row in tl.static_range(1 + STATES):
            values = values + (_load(written[row], at, left, COMPUTE, FULL),)
        if RULE == COMBINING:
            values = (d,)
        elif RULE == "adamw":
            values = _adamw(d, values, scalars, STATES, COMPUTE)
        elif RULE == "sgd":
            values = _sgd(d, values, scalars, STATES, NESTEROV, FIRST)
        else:
            values = _lion(d, values, scalars, COMPUTE)
        for row in tl.static_range(1 + STATES):
            _store(written[row], at, left, values[row], live, MEASURE, DTYPE, FULL)
        start += BLOCK // STRIDE
    if MEASURE:
        store_sums(sums, partials, chunks, K, REACH, SUM_LANES)


@triton.jit
def _scalars(numbers, rate, step, COMPUTE: tl.constexpr, RULE: tl.constexpr):
    """What a rule multiplies with, from the numbers of a group and the address of a counter of steps."""
    if RULE == "adamw":
        beta1, beta2 = tl.load(numbers + 2), tl.load(numbers + 3)
        count = (tl.load(tl.load(step).to(tl.pointer_type(tl.float32))) + 1).to(tl.int64)
        return (
            (1 - rate * tl.load(numbers + 4)).to(COMPUTE),
            (1 - beta1).to(COMPUTE),
            beta2.to(COMPUTE),
            (1 - beta2).to(COMPUTE),
            (-rate / (1 - _power(beta1, count))).to(COMPUTE),
            (1 / tl.sqrt(1 - _power(beta2, count))).to(COMPUTE),
            tl.load(numbers + 5).to(COMPUTE),
        )
    elif RULE == "sgd":
        return (
            tl.load(numbers + 4).to(COMPUTE),
            tl.load(numbers + 2).to(COMPUTE),
            (1 - tl.load(numbers + 3)).to(COMPUTE),
            (-rate).to(COMPUTE),
        )
    else:
        return (
            (1 - rate * tl.load(numbers + 4)).to(COMPUTE),
            (1 - tl.load(numbers + 2)).to(COMPUTE),
            (1 - tl.load(numbers + 3)).to(COMPUTE),
            (-rate).to(COMPUTE),
        )


@triton.jit
def _adamw(d, values, scalars, STATES: tl.constexpr, COMPUTE: tl.constexpr):
    """AdamW (Loshchilov and Hutter, 2019), with torch's placement of the bias corrections.

    m <- m + (1 - beta1) (d - m),   v <- beta2 v + (1 - beta2) d^2,
    p <- p (1 - lr wd) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    """
    decay, one_minus_beta1, beta2, one_minus_beta2, negative_step_size, root_correction, eps = scalars
    m = tl.fma(one_minus_beta1, d - values[1], values[1])
    v = tl.fma(one_minus_beta2 * d, d, beta2 * values[2])
    states = (m, v)
    largest = v
    if STATES == 3:  # amsgrad
        largest = tl.maximum(values[3], v)
        states = (m, v, largest)
    denominator = tl.fma(_sqrt(largest, COMPUTE), root_correction, eps)
    p = tl.fma(negative_step_size, _divide(m, denominator, COMPUTE), values[0] * decay)
    return (p,) + states


@triton.jit
def _sgd(d, values, scalars, STATES: tl.constexpr, NESTEROV: tl.constexpr, FIRST: tl.constexpr):
    """SGD as torch does it: momentum, dampening, Nesterov, L2 weight decay. FIRST: the buffer holds nothing yet."""
    weight_decay, momentum, one_minus_dampening, negative_lr = scalars
    d = tl.where(weight_decay != 0, tl.fma(weight_decay, values[0], d), d)  # 0 times infinity would be NaN
    states = ()
    if STATES == 1:
        buffer = d if FIRST else tl.fma(momentum, values[1], one_minus_dampening * d)
        states = (buffer,)
        d = tl.fma(momentum, buffer, d) if NESTEROV else buffer
    return (tl.fma(negative_lr, d, values[0]),) + states


@triton.jit
def _lion(d, values, scalars, COMPUTE: tl.constexpr):
    """Lion (Chen et al., 2023).

    p <- p (1 - lr wd) - lr sign(m + (1 - beta1) (d - m)),   m <- m + (1 - beta2) (d - m)
    """
    decay, one_minus_beta1, one_minus_beta2, negative_lr = scalars
    p, m = values
    c = tl.fma(one_minus_beta1, d - m, m)
    size = tl.maximum(tl.abs(c), 1.1754943508222875e-38).to(COMPUTE)  # as in update_rules.h
    return tl.fma(negative_lr, _divide(c, size, COMPUTE), p * decay), tl.fma(one_minus_beta2, d - m, m)


@triton.jit
def _power(x, n):
    """x^n in float64, by squaring: the same multiplications as `power` in csrc/include/dtokd/numbers.h."""
    result = tl.full((), 1.0, tl.float64)
    while n > 0:
        result = tl.where(n % 2 == 1, result * x, result)
        x *= x
        n = n // 2
    return result


@triton.jit
def _gradients(
    table,
    T,
    t,
    offset,
    coefficients,
    REACH: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    FULL: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    """For each gradient the pointer to its chunk, the factor before it, and whether it is read at all."""
    grads, factors, read = (), (), ()
    for k in tl.static_range(objectives(REACH)):
        c = tl.load(coefficients + _objective(REACH, k))
        grads = grads + (pointer_to(table, T, t, k, offset, DTYPE, CHUNK, FULL),)
        factors = factors + ((-c if MAXIMIZE else c).to(COMPUTE),)
        read = read + (c != 0,)
    return grads, factors, read


@triton.constexpr_function
def _objective(reach, k):
    """Objective number k of those in `reach`."""
    return [i for i in range(reach.bit_length()) if reach >> i & 1][k]


@triton.jit
def _combined(grads, factors, read, at, left, K: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    """The combined gradient sum_i c_i g_i at these elements."""
    d = tl.zeros_like(at).to(COMPUTE)
    for k in tl.static_range(K):
        # a mask that is the same for all lanes leaves 16-byte accesses whole
        mask = read[k] if FULL else at < tl.where(read[k], left, 0)
        g = tl.load(grads[k] + at, mask=mask, other=0.0).to(COMPUTE)
        d = factors[k] * g if k == 0 else tl.fma(factors[k], g, d)
    return d


@triton.constexpr_function
def stride(measure, full, block):
    """How far apart the elements are that are taken at a time; see `_places`."""
    return block // SUM_LANES if measure and not full else 1


@triton.jit
def _places(start, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The elements that are taken after `start` others: BLOCK neighbours, or one of each lane.

    A ragged chunk is measured so: of the STRIDE elements that a lane adds up in memory's order the threads get one
    after the other, and none has to be handed to another thread.
    """
    if STRIDE == 1:
        return start + tl.arange(0, BLOCK)
    else:
        lanes: tl.constexpr = BLOCK // STRIDE
        return start // BLOCK * BLOCK + tl.arange(0, lanes) * STRIDE + start // lanes % STRIDE


@triton.jit
def _combined_and_measured(
    grads,
    factors,
    read,
    at,
    left,
    sums,
    R: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """The same, from gradients that are all read, and the sums with their products."""
    VECTOR: tl.constexpr = BLOCK // SUM_LANES if FULL else 1
    d = tl.zeros_like(at).to(COMPUTE)
    x = ()
    for k in tl.static_range(R):
        g = tl.load(grads[k] + at) if FULL else tl.load(grads[k] + at, mask=at < left, other=0.0)
        x = x + (columns(g, VECTOR, SUM_LANES),)
        g = tl.where(read[k], g, 0.0).to(COMPUTE)
        d = factors[k] * g if k == 0 else tl.fma(factors[k], g, d)
    return d, add_products(sums, x, R, VECTOR)


@triton.jit
def _load(pointer, at, left, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointer + at, eviction_policy="evict_first").to(COMPUTE)
    else:
        return tl.load(pointer + at, mask=at < left, other=0.0).to(COMPUTE)


@triton.jit
def _store(pointer, at, left, value, live, MEASURE: tl.constexpr, DTYPE: tl.constexpr, FULL: tl.constexpr):
    """Nothing is stored if not live; without MEASURE this is not called then."""
    if not FULL:
        tl.store(pointer + at, rounded(value, DTYPE), mask=at < (tl.where(live, left, 0) if MEASURE else left))
    elif MEASURE:
        tl.store(pointer + at, rounded(value, DTYPE), mask=live, eviction_policy="evict_first")
    else:
        tl.store(pointer + at, rounded(value, DTYPE), eviction_policy="evict_first")


@triton.jit
def _divide(a, b, COMPUTE: tl.constexpr):
    """Quotient a / b, rounded to nearest: plain division of float32 is approximate on a GPU."""
    if COMPUTE == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _sqrt(x, COMPUTE: tl.constexpr):
    if COMPUTE == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)
