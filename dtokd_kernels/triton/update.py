"""What is done with the combined gradient d = sum_i c_i g_i: stored, or descended by AdamW or SGD.

The formulas are those of `csrc/include/dtokd/update_rules.h`, fused multiply-adds included; the compiler may fuse no
others, so neither the number of warps nor a version of it changes a bit. Computed in float32, or float64 for float64
tensors; numbers of a parameter group arrive as float64 and are rounded once, here. Coefficients and `skipped` are
read by the kernels, so that nothing waits for them; a gradient whose coefficient is exactly 0 is not read. Chunks are
walked last first, as the Gram pass has read the last gradients most recently, and parameters and states are marked to
leave the cache first.

An update kernel with MEASURE also takes the Gram matrix of the gradients: it reads all of them, of a skipped step too,
and adds as NOTE [Sums] in `gram` says. So it has as many warps as the Gram kernel.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment, var-annotated"
# ruff: noqa: RUF005, SIM300 (triton knows no starred tuples; constants are in capitals, as in all of triton)

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rules import Rule
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


#: How the update kernels are compiled.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}


def constants(dtype: torch.dtype) -> dict[str, Any]:
    """What the update kernels are specialized for, for tensors of a dtype."""
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

    def run(self, kernel: Any, table: Table, *ticket: Tensor, measured: bool, **flags: Any) -> Tensor | None:
        """Launch an update kernel on a table that begins with the gradients and the parameters.

        Returns:
            If `measured`, the Gram matrices [3, K, K] of the gradients, by one launch more.
        """
        numbers = numbers_of(self.numbers, self.params)
        K, chunks = self.table.shape[1], max(table.chunks, 1)
        sums = None
        if measured:
            sums = torch.empty(K * (K + 1) // 2 * chunks, dtype=torch.float64, device=self.table.device)
        _launch(
            kernel, table, self.params[0].dtype, self.table, self.skipped, *ticket, numbers, self.tensor_lr, sums,
            chunks, K=K, REACH=self.reach, TENSOR_LR=self.tensor_lr is not None, MEASURE=measured, **flags,
        )  # fmt: skip
        if sums is None:
            return None
        of_role = [0, 0, 0]
        of_role[int(self.numbers[0])] = table.chunks
        return added_up(sums, of_role, K)


def combine(out: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], reach: int, coefficients: Tensor) -> None:
    """Store sum_i c_i g_i in `out`, which may be one of the lists. One launch.

    Args:
        out: T tensors.
        grads: for each objective in `reach` a list of T tensors that fit them.
        reach: bit i set if objective i has a gradient here.
        coefficients: [K] float64 on their device.
    """
    _launch(combine_kernel, table_of([*grads, out]), out[0].dtype, coefficients, REACH=reach)


#: Hyper-parameters that a kernel is specialized for.
FLAGS = ("maximize", "amsgrad", "nesterov", "first")


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
        states: a list that fits the parameters for each state that they have, in the rule's order; then their counters
            of steps, if the rule counts them.
        numbers: the hyper-parameters by name; the flags are those of all groups.
        ticket: int32, 0 before and after.
        measured: return the Gram matrices [3, K, K] of the gradients, from the same pass.
    """
    flags: dict[str, Any] = {"MAXIMIZE": bool(numbers["maximize"])}
    counters: Sequence[Tensor] = ()
    if rule.counts_steps:
        *states, counters = states
        flags["STEP"] = DTYPES[counters[0].dtype]
    kernel = {"adamw": adamw_kernel, "sgd": sgd_kernel, "lion": lion_kernel}[rule.name]
    if rule.name == "adamw":
        flags["AMSGRAD"] = len(states) == 3
    elif rule.name == "sgd":
        flags |= {"MOMENTUM": bool(states), "NESTEROV": bool(numbers["nesterov"]), "FIRST": bool(numbers["first"])}
    return descent.run(
        kernel,
        table_of([*descent.grads, descent.params, *states], counters, descent.groups),
        *([ticket] if rule.counts_steps else []),
        measured=measured,
        **flags,
    )


def _launch(kernel: Any, table: Table, dtype: torch.dtype, *args: Any, **flags: Any) -> None:
    """One program per chunk of a table whose tensors are of this dtype; one if all are empty."""
    kernel[(max(table.chunks, 1),)](table.numbers, table.tensors, *args, **flags, **constants(dtype), **OPTIONS)


@triton.jit(do_not_specialize=["T"])
def combine_kernel(
    table,
    T,
    coefficients,
    REACH: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of the table: R gradients, out. Reads R * CHUNK elements, writes CHUNK; one program per chunk."""
    t, offset, left, full = find(table, T, tl.num_programs(0) - 1 - tl.program_id(0), CHUNK)
    if full:
        _combine(table, T, t, offset, left, coefficients, REACH, DTYPE, COMPUTE, CHUNK, BLOCK, True)
    else:
        # fewer elements at a time: these are few, and their path should cost the other no registers
        _combine(table, T, t, offset, left, coefficients, REACH, DTYPE, COMPUTE, CHUNK, BLOCK // 4, False)


@triton.jit
def _combine(
    table,
    T,
    t,
    offset,
    left,
    coefficients,
    REACH: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    R: tl.constexpr = objectives(REACH)
    grads, factors, read = _gradients(table, T, t, offset, coefficients, REACH, DTYPE, COMPUTE, CHUNK, FULL, False)
    out = pointer_to(table, T, t, R, offset, DTYPE, CHUNK, FULL)
    start = 0
    end = CHUNK if FULL else tl.minimum(left, CHUNK)
    while start < end:
        at = start + tl.arange(0, BLOCK)
        d = _combined(grads, factors, read, at, left, R, COMPUTE, FULL)
        _store(out, at, left, d, True, False, DTYPE, FULL)
        start += BLOCK


@triton.jit(do_not_specialize=["T", "chunks"])
def adamw_kernel(
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
    TENSOR_LR: tl.constexpr,
    MEASURE: tl.constexpr,
    STEP: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """AdamW (Loshchilov and Hutter, 2019), with torch's placement of the bias corrections.

    Rows of the table: R gradients, parameter, exp_avg, exp_avg_sq, with amsgrad max_exp_avg_sq, step counter, group.
    Reads R + 3 (4) times CHUNK elements, writes 3 (4) times; one program per chunk. ticket: 0 before and after.
    MEASURE: and the chunk's sums into its column of partials [K(K+1)/2, chunks].

        m <- m + (1 - beta1) (d - m),   v <- beta2 v + (1 - beta2) d^2,
        p <- p (1 - lr wd) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    """
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    t, offset, left, full = find(table, T, chunk, CHUNK)
    steps = table + (3 + objectives(REACH) + (4 if AMSGRAD else 3)) * T
    numbers += tl.load(steps + T + t) * 8  # of the tensor's group: the role, and AdamW's numbers
    coefficients += tl.load(numbers).to(tl.int32) * K  # of its role
    rate = _rate(numbers + 1, tensor_lr, TENSOR_LR)
    beta1, beta2 = tl.load(numbers + 2), tl.load(numbers + 3)
    count = (tl.load(tl.load(steps + t).to(tl.pointer_type(STEP))) + 1).to(tl.int64)
    scalars = (
        (1 - rate * tl.load(numbers + 4)).to(COMPUTE),
        (1 - beta1).to(COMPUTE),
        beta2.to(COMPUTE),
        (1 - beta2).to(COMPUTE),
        (-rate / (1 - _power(beta1, count))).to(COMPUTE),
        (1 / tl.sqrt(1 - _power(beta2, count))).to(COMPUTE),
        tl.load(numbers + 5).to(COMPUTE),
    )
    live = tl.load(skipped) == 0
    if MEASURE:
        partials += chunk
    if live | MEASURE:
        if full:
            _adamw(
                table, T, t, offset, left, coefficients, scalars, live, partials, chunks, K, REACH, MEASURE, MAXIMIZE,
                AMSGRAD, DTYPE, COMPUTE, CHUNK, BLOCK, True,
            )  # fmt: skip
        else:
            _adamw(
                table, T, t, offset, left, coefficients, scalars, live, partials, chunks, K, REACH, MEASURE, MAXIMIZE,
                AMSGRAD, DTYPE, COMPUTE, CHUNK, BLOCK if MEASURE else BLOCK // 4, False,
            )  # fmt: skip
    if live:  # noqa: SIM102 (triton's `and` takes the ticket in any case)
        if last_program(ticket, tl.num_programs(0)):  # all have read the counters
            tl.store(ticket, 0)
            _count_up(steps, T, STEP)


@triton.jit
def _count_up(steps, T, STEP: tl.constexpr):
    """Add 1 to the T counters at these addresses."""
    start = 0
    while start < T:
        t = start + tl.arange(0, COUNT_BLOCK)
        step = tl.load(steps + t, mask=t < T, other=0).to(tl.pointer_type(STEP))
        tl.store(step, tl.load(step, mask=t < T, other=0.0) + 1, mask=t < T)
        start += COUNT_BLOCK


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
def _adamw(
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
    MEASURE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    decay, one_minus_beta1, beta2, one_minus_beta2, negative_step_size, root_correction, eps = scalars
    R: tl.constexpr = objectives(REACH)
    grads, factors, read = _gradients(table, T, t, offset, coefficients, REACH, DTYPE, COMPUTE, CHUNK, FULL, MAXIMIZE)
    param = pointer_to(table, T, t, R, offset, DTYPE, CHUNK, FULL)
    exp_avg = pointer_to(table, T, t, R + 1, offset, DTYPE, CHUNK, FULL)
    exp_avg_sq = pointer_to(table, T, t, R + 2, offset, DTYPE, CHUNK, FULL)
    if AMSGRAD:
        max_exp_avg_sq = pointer_to(table, T, t, R + 3, offset, DTYPE, CHUNK, FULL)
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
        p = _load(param, at, left, COMPUTE, FULL)
        m = _load(exp_avg, at, left, COMPUTE, FULL)
        v = _load(exp_avg_sq, at, left, COMPUTE, FULL)
        m = tl.fma(one_minus_beta1, d - m, m)
        v = tl.fma(one_minus_beta2 * d, d, beta2 * v)
        largest = v
        if AMSGRAD:
            largest = tl.maximum(_load(max_exp_avg_sq, at, left, COMPUTE, FULL), v)
            _store(max_exp_avg_sq, at, left, largest, live, MEASURE, DTYPE, FULL)
        denominator = tl.fma(_sqrt(largest, COMPUTE), root_correction, eps)
        p = tl.fma(negative_step_size, _divide(m, denominator, COMPUTE), p * decay)
        _store(param, at, left, p, live, MEASURE, DTYPE, FULL)
        _store(exp_avg, at, left, m, live, MEASURE, DTYPE, FULL)
        _store(exp_avg_sq, at, left, v, live, MEASURE, DTYPE, FULL)
        start += BLOCK // STRIDE
    if MEASURE:
        store_sums(sums, partials, chunks, K, REACH, SUM_LANES)


@triton.jit(do_not_specialize=["T", "chunks"])
def sgd_kernel(
    table,
    T,
    coefficients,
    skipped,
    numbers,
    tensor_lr,
    partials,
    chunks,
    K: tl.constexpr,
    REACH: tl.constexpr,
    TENSOR_LR: tl.constexpr,
    MEASURE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """SGD as torch does it: momentum, dampening, Nesterov, L2 weight decay.

    Rows of the table: R gradients, parameter, with momentum its buffer, group. FIRST: the buffer holds nothing yet.
    Reads R + 1 (2) times CHUNK elements, writes 1 (2) times; one program per chunk. MEASURE: as in `adamw_kernel`.
    """
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    t, offset, left, full = find(table, T, chunk, CHUNK)
    group = table + (3 + objectives(REACH) + (2 if MOMENTUM else 1)) * T
    numbers += tl.load(group + t) * 8  # the role, and SGD's numbers
    coefficients += tl.load(numbers).to(tl.int32) * K
    scalars = (
        tl.load(numbers + 4).to(COMPUTE),
        tl.load(numbers + 2).to(COMPUTE),
        (1 - tl.load(numbers + 3)).to(COMPUTE),
        (-_rate(numbers + 1, tensor_lr, TENSOR_LR)).to(COMPUTE),
    )
    live = tl.load(skipped) == 0
    if MEASURE:
        partials += chunk
    if live | MEASURE:
        if full:
            _sgd(
                table, T, t, offset, left, coefficients, scalars, live, partials, chunks, K, REACH, MEASURE, MAXIMIZE,
                MOMENTUM, NESTEROV, FIRST, DTYPE, COMPUTE, CHUNK, BLOCK, True,
            )  # fmt: skip
        else:
            _sgd(
                table, T, t, offset, left, coefficients, scalars, live, partials, chunks, K, REACH, MEASURE, MAXIMIZE,
                MOMENTUM, NESTEROV, FIRST, DTYPE, COMPUTE, CHUNK, BLOCK if MEASURE else BLOCK // 4, False,
            )  # fmt: skip


@triton.jit
def _sgd(
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
    MEASURE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    weight_decay, momentum, one_minus_dampening, negative_lr = scalars
    R: tl.constexpr = objectives(REACH)
    grads, factors, read = _gradients(table, T, t, offset, coefficients, REACH, DTYPE, COMPUTE, CHUNK, FULL, MAXIMIZE)
    param = pointer_to(table, T, t, R, offset, DTYPE, CHUNK, FULL)
    if MOMENTUM:
        momentum_buffer = pointer_to(table, T, t, R + 1, offset, DTYPE, CHUNK, FULL)
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
        p = _load(param, at, left, COMPUTE, FULL)
        d = tl.fma(weight_decay, p, d)
        if MOMENTUM:
            buffer = d
            if not FIRST:
                old = _load(momentum_buffer, at, left, COMPUTE, FULL)
                buffer = tl.fma(momentum, old, one_minus_dampening * d)
            _store(momentum_buffer, at, left, buffer, live, MEASURE, DTYPE, FULL)
            d = tl.fma(momentum, buffer, d) if NESTEROV else buffer
        _store(param, at, left, tl.fma(negative_lr, d, p), live, MEASURE, DTYPE, FULL)
        start += BLOCK // STRIDE
    if MEASURE:
        store_sums(sums, partials, chunks, K, REACH, SUM_LANES)


@triton.jit(do_not_specialize=["T", "chunks"])
def lion_kernel(
    table,
    T,
    coefficients,
    skipped,
    numbers,
    tensor_lr,
    partials,
    chunks,
    K: tl.constexpr,
    REACH: tl.constexpr,
    TENSOR_LR: tl.constexpr,
    MEASURE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lion (Chen et al., 2023).

    Rows of the table: R gradients, parameter, exp_avg, group. Reads R + 2 times CHUNK elements, writes 2 times; one
    program per chunk. MEASURE: as in `adamw_kernel`.

        p <- p (1 - lr wd) - lr sign(m + (1 - beta1) (d - m)),   m <- m + (1 - beta2) (d - m)
    """
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    t, offset, left, full = find(table, T, chunk, CHUNK)
    numbers += tl.load(table + (5 + objectives(REACH)) * T + t) * 6  # the role, and Lion's numbers
    coefficients += tl.load(numbers).to(tl.int32) * K
    rate = _rate(numbers + 1, tensor_lr, TENSOR_LR)
    scalars = (
        (1 - rate * tl.load(numbers + 4)).to(COMPUTE),
        (1 - tl.load(numbers + 2)).to(COMPUTE),
        (1 - tl.load(numbers + 3)).to(COMPUTE),
        (-rate).to(COMPUTE),
    )
    live = tl.load(skipped) == 0
    if MEASURE:
        partials += chunk
    if live | MEASURE:
        if full:
            _lion(
                table, T, t, offset, left, coefficients, scalars, live, partials, chunks, K, REACH, MEASURE, MAXIMIZE,
                DTYPE, COMPUTE, CHUNK, BLOCK, True,
            )  # fmt: skip
        else:
            _lion(
                table, T, t, offset, left, coefficients, scalars, live, partials, chunks, K, REACH, MEASURE, MAXIMIZE,
                DTYPE, COMPUTE, CHUNK, BLOCK if MEASURE else BLOCK // 4, False,
            )  # fmt: skip


@triton.jit
def _lion(
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
    MEASURE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    decay, one_minus_beta1, one_minus_beta2, negative_lr = scalars
    R: tl.constexpr = objectives(REACH)
    grads, factors, read = _gradients(table, T, t, offset, coefficients, REACH, DTYPE, COMPUTE, CHUNK, FULL, MAXIMIZE)
    param = pointer_to(table, T, t, R, offset, DTYPE, CHUNK, FULL)
    exp_avg = pointer_to(table, T, t, R + 1, offset, DTYPE, CHUNK, FULL)
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
        p = _load(param, at, left, COMPUTE, FULL)
        m = _load(exp_avg, at, left, COMPUTE, FULL)
        c = tl.fma(one_minus_beta1, d - m, m)
        size = tl.maximum(tl.abs(c), 1.1754943508222875e-38).to(COMPUTE)  # as in update_rules.h
        p = tl.fma(negative_lr, _divide(c, size, COMPUTE), p * decay)
        _store(param, at, left, p, live, MEASURE, DTYPE, FULL)
        _store(exp_avg, at, left, tl.fma(one_minus_beta2, d - m, m), live, MEASURE, DTYPE, FULL)
        start += BLOCK // STRIDE
    if MEASURE:
        store_sums(sums, partials, chunks, K, REACH, SUM_LANES)


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
    """Nothing if not live; without MEASURE it is not called then."""
    if not FULL:
        tl.store(pointer + at, rounded(value, DTYPE), mask=at < (tl.where(live, left, 0) if MEASURE else left))
    elif MEASURE:
        tl.store(pointer + at, rounded(value, DTYPE), mask=live, eviction_policy="evict_first")
    else:
        tl.store(pointer + at, rounded(value, DTYPE), eviction_policy="evict_first")


@triton.jit
def _rate(lr, tensor_lr, TENSOR_LR: tl.constexpr):
    """The learning rate in float64: of the group, or the user's tensor."""
    if TENSOR_LR:
        return tl.load(tensor_lr).to(tl.float64)
    else:
        return tl.load(lr)


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
