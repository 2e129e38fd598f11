"""What is done with the combined gradient d = sum_i c_i g_i: stored, or descended by AdamW or SGD.

The formulas are those of `csrc/include/dtokd/update_rules.h`, fused multiply-adds included; the compiler may fuse no
others, so neither a configuration nor a version of it changes a bit. Computed in float32, or float64 for float64
tensors; numbers that come from the host arrive as float64 and are rounded once, here. Coefficients and `skipped` are
read by the kernels, so that nothing waits for them; a gradient whose coefficient is exactly 0 is not read. Chunks are
walked last first, as the Gram pass has read the last gradients most recently, and parameters and states are marked to
leave the cache first. `tuning` chooses how a kernel is compiled.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment, var-annotated"
# ruff: noqa: RUF005, SIM300 (triton knows no starred tuples; constants are in capitals, as in all of triton)

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import fused
from . import tuning
from .tables import (
    CHUNK,
    DTYPES,
    VECTOR_BYTES,
    Table,
    double,
    find,
    last_program,
    pointer_to,
    rounded,
    table_of,
)

COUNT_BLOCK = tl.constexpr(128)


def options(config: tuning.Config) -> dict[str, Any]:
    """How the update kernels are compiled in a configuration."""
    return {"num_warps": config.num_warps, "enable_fp_fusion": False}


def constants(dtype: torch.dtype, config: tuning.Config) -> dict[str, Any]:
    """What the update kernels of a dtype are specialized for in a configuration."""
    return {
        "DTYPE": DTYPES[dtype],
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "CHUNK": CHUNK,
        "BLOCK": 32 * config.num_warps * config.vectors * VECTOR_BYTES // dtype.itemsize,
    }


def combine(out: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], coefficients: Tensor) -> None:
    """Store sum_i c_i g_i in `out`, which may be one of the lists. One launch.

    Args:
        out: T tensors.
        grads: K lists of T tensors that fit them.
        coefficients: [K] float64 on their device.
    """
    _launch(combine_kernel, table_of([*grads, out]), out[0].dtype, coefficients, K=len(grads))


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    states: Sequence[Sequence[Tensor]],
    state_steps: Sequence[Tensor],
    coefficients: Tensor,
    skipped: Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
) -> None:
    """One AdamW step, one launch: the last program to finish counts the steps of all tensors.

    Args:
        params: T parameters.
        grads: K lists of gradients that fit them.
        states: lists exp_avgs, exp_avg_sqs and, with amsgrad, max_exp_avg_sqs that fit them.
        state_steps: T scalars of one float dtype, on the parameters' device.
        coefficients: [K] float64 on their device.
        skipped: bool on their device.
        lr: a number, or a scalar tensor on their device.
    """
    K = len(grads)
    table = table_of([*grads, params, *states], state_steps)
    _launch(
        adamw_kernel, table, params[0].dtype, coefficients, skipped, fused.tickets(coefficients.device),
        *_number_and_tensor(lr), beta1, beta2, weight_decay, eps,
        K=K, TENSOR_LR=isinstance(lr, Tensor), STEP=DTYPES[state_steps[0].dtype], MAXIMIZE=maximize,
        AMSGRAD=len(states) == 3,
    )  # fmt: skip


def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    momentum_buffers: Sequence[Tensor],
    coefficients: Tensor,
    skipped: Tensor,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """One SGD step, one launch. Arguments as in `adamw_step`; `momentum_buffers` has T tensors or none."""
    buffers = [momentum_buffers] if momentum_buffers else []
    _launch(
        sgd_kernel, table_of([*grads, params, *buffers]), params[0].dtype, coefficients, skipped,
        *_number_and_tensor(lr), momentum, dampening, weight_decay,
        K=len(grads), TENSOR_LR=isinstance(lr, Tensor), MAXIMIZE=maximize, MOMENTUM=bool(buffers), NESTEROV=nesterov,
        FIRST=first,
    )  # fmt: skip


def _number_and_tensor(lr: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, lr) if isinstance(lr, Tensor) else (lr, None)


def _launch(kernel: Any, table: Table, dtype: torch.dtype, *args: Any, **flags: Any) -> None:
    """One program per chunk of a table whose tensors are of this dtype; one if all are empty."""

    def launch(config: tuning.Config, table: Table, args: Sequence[Any]) -> None:
        compiled_for = {**constants(dtype, config), **options(config)}
        kernel[(max(table.chunks, 1),)](table.numbers, table.tensors, *args, **flags, **compiled_for)

    once = flags.get("FIRST")  # not worth tuning
    config = tuning.DEFAULT if once else tuning.choose(launch, table, dtype, args, kernel, **flags)
    launch(config, table, args)


@triton.jit(do_not_specialize=["T"])
def combine_kernel(
    table,
    T,
    coefficients,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of the table: K gradients, out. Reads K * CHUNK elements, writes CHUNK; one program per chunk."""
    t, offset, left, full = find(table, T, tl.num_programs(0) - 1 - tl.program_id(0), CHUNK)
    if full:
        _combine(table, T, t, offset, left, coefficients, K, DTYPE, COMPUTE, CHUNK, BLOCK, True)
    else:
        # fewer elements at a time: these are few, and their path should cost the other no registers
        _combine(table, T, t, offset, left, coefficients, K, DTYPE, COMPUTE, CHUNK, BLOCK // 4, False)


@triton.jit
def _combine(
    table,
    T,
    t,
    offset,
    left,
    coefficients,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    grads, factors, read = _gradients(table, T, t, offset, coefficients, K, DTYPE, COMPUTE, CHUNK, FULL, False)
    out = pointer_to(table, T, t, K, offset, DTYPE, CHUNK, FULL)
    start = 0
    end = CHUNK if FULL else tl.minimum(left, CHUNK)
    while start < end:
        at = start + tl.arange(0, BLOCK)
        d = _combined(grads, factors, read, at, left, K, COMPUTE, FULL)
        _store(out, at, left, d, DTYPE, FULL)
        start += BLOCK


@triton.jit(do_not_specialize=["T"])
def adamw_kernel(
    table,
    T,
    coefficients,
    skipped,
    ticket,
    lr: tl.float64,
    tensor_lr,
    beta1: tl.float64,
    beta2: tl.float64,
    weight_decay: tl.float64,
    eps: tl.float64,
    K: tl.constexpr,
    TENSOR_LR: tl.constexpr,
    STEP: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """AdamW (Loshchilov and Hutter, 2019), with torch's placement of the bias corrections.

    Rows of the table: K gradients, parameter, exp_avg, exp_avg_sq, with amsgrad max_exp_avg_sq, step counter. Reads
    K + 3 (4) times CHUNK elements, writes 3 (4) times; one program per chunk. ticket: int32, 0 before and after.

        m <- m + (1 - beta1) (d - m),   v <- beta2 v + (1 - beta2) d^2,
        p <- p (1 - lr wd) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    """
    t, offset, left, full = find(table, T, tl.num_programs(0) - 1 - tl.program_id(0), CHUNK)
    rate = _rate(lr, tensor_lr, TENSOR_LR)
    steps = table + (3 + K + (4 if AMSGRAD else 3)) * T
    count = (tl.load(tl.load(steps + t).to(tl.pointer_type(STEP))) + 1).to(tl.int64)
    scalars = (
        (1 - rate * double(weight_decay)).to(COMPUTE),
        (1 - double(beta1)).to(COMPUTE),
        double(beta2).to(COMPUTE),
        (1 - double(beta2)).to(COMPUTE),
        (-rate / (1 - _power(double(beta1), count))).to(COMPUTE),
        (1 / tl.sqrt(1 - _power(double(beta2), count))).to(COMPUTE),
        double(eps).to(COMPUTE),
    )
    if tl.load(skipped) == 0:
        if full:
            _adamw(
                table, T, t, offset, left, coefficients, scalars, K, MAXIMIZE, AMSGRAD,
                DTYPE, COMPUTE, CHUNK, BLOCK, True,
            )  # fmt: skip
        else:
            _adamw(
                table, T, t, offset, left, coefficients, scalars, K, MAXIMIZE, AMSGRAD,
                DTYPE, COMPUTE, CHUNK, BLOCK // 4, False,
            )  # fmt: skip
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
    K: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    decay, one_minus_beta1, beta2, one_minus_beta2, negative_step_size, root_correction, eps = scalars
    grads, factors, read = _gradients(table, T, t, offset, coefficients, K, DTYPE, COMPUTE, CHUNK, FULL, MAXIMIZE)
    param = pointer_to(table, T, t, K, offset, DTYPE, CHUNK, FULL)
    exp_avg = pointer_to(table, T, t, K + 1, offset, DTYPE, CHUNK, FULL)
    exp_avg_sq = pointer_to(table, T, t, K + 2, offset, DTYPE, CHUNK, FULL)
    if AMSGRAD:
        max_exp_avg_sq = pointer_to(table, T, t, K + 3, offset, DTYPE, CHUNK, FULL)
    start = 0
    end = CHUNK if FULL else tl.minimum(left, CHUNK)
    while start < end:
        at = start + tl.arange(0, BLOCK)
        d = _combined(grads, factors, read, at, left, K, COMPUTE, FULL)
        p = _load(param, at, left, COMPUTE, FULL)
        m = _load(exp_avg, at, left, COMPUTE, FULL)
        v = _load(exp_avg_sq, at, left, COMPUTE, FULL)
        m = tl.fma(one_minus_beta1, d - m, m)
        v = tl.fma(one_minus_beta2 * d, d, beta2 * v)
        largest = v
        if AMSGRAD:
            largest = tl.maximum(_load(max_exp_avg_sq, at, left, COMPUTE, FULL), v)
            _store(max_exp_avg_sq, at, left, largest, DTYPE, FULL)
        denominator = tl.fma(_sqrt(largest, COMPUTE), root_correction, eps)
        p = tl.fma(negative_step_size, _divide(m, denominator, COMPUTE), p * decay)
        _store(param, at, left, p, DTYPE, FULL)
        _store(exp_avg, at, left, m, DTYPE, FULL)
        _store(exp_avg_sq, at, left, v, DTYPE, FULL)
        start += BLOCK


@triton.jit(do_not_specialize=["T"])
def sgd_kernel(
    table,
    T,
    coefficients,
    skipped,
    lr: tl.float64,
    tensor_lr,
    momentum: tl.float64,
    dampening: tl.float64,
    weight_decay: tl.float64,
    K: tl.constexpr,
    TENSOR_LR: tl.constexpr,
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

    Rows of the table: K gradients, parameter, with momentum its buffer. FIRST: the buffer holds nothing yet. Reads
    K + 1 (2) times CHUNK elements, writes 1 (2) times; one program per chunk.
    """
    t, offset, left, full = find(table, T, tl.num_programs(0) - 1 - tl.program_id(0), CHUNK)
    scalars = (
        double(weight_decay).to(COMPUTE),
        double(momentum).to(COMPUTE),
        (1 - double(dampening)).to(COMPUTE),
        (-_rate(lr, tensor_lr, TENSOR_LR)).to(COMPUTE),
    )
    if tl.load(skipped) == 0:
        if full:
            _sgd(
                table, T, t, offset, left, coefficients, scalars, K, MAXIMIZE, MOMENTUM, NESTEROV, FIRST,
                DTYPE, COMPUTE, CHUNK, BLOCK, True,
            )  # fmt: skip
        else:
            _sgd(
                table, T, t, offset, left, coefficients, scalars, K, MAXIMIZE, MOMENTUM, NESTEROV, FIRST,
                DTYPE, COMPUTE, CHUNK, BLOCK // 4, False,
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
    K: tl.constexpr,
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
    grads, factors, read = _gradients(table, T, t, offset, coefficients, K, DTYPE, COMPUTE, CHUNK, FULL, MAXIMIZE)
    param = pointer_to(table, T, t, K, offset, DTYPE, CHUNK, FULL)
    if MOMENTUM:
        momentum_buffer = pointer_to(table, T, t, K + 1, offset, DTYPE, CHUNK, FULL)
    start = 0
    end = CHUNK if FULL else tl.minimum(left, CHUNK)
    while start < end:
        at = start + tl.arange(0, BLOCK)
        p = _load(param, at, left, COMPUTE, FULL)
        d = tl.fma(weight_decay, p, _combined(grads, factors, read, at, left, K, COMPUTE, FULL))
        if MOMENTUM:
            buffer = d
            if not FIRST:
                old = _load(momentum_buffer, at, left, COMPUTE, FULL)
                buffer = tl.fma(momentum, old, one_minus_dampening * d)
            _store(momentum_buffer, at, left, buffer, DTYPE, FULL)
            d = tl.fma(momentum, buffer, d) if NESTEROV else buffer
        _store(param, at, left, tl.fma(negative_lr, d, p), DTYPE, FULL)
        start += BLOCK


@triton.jit
def _gradients(
    table,
    T,
    t,
    offset,
    coefficients,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    FULL: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    """For each gradient the pointer to its chunk, the factor before it, and whether it is read at all."""
    grads, factors, read = (), (), ()
    for k in tl.static_range(K):
        c = tl.load(coefficients + k)
        grads = grads + (pointer_to(table, T, t, k, offset, DTYPE, CHUNK, FULL),)
        factors = factors + ((-c if MAXIMIZE else c).to(COMPUTE),)
        read = read + (c != 0,)
    return grads, factors, read


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


@triton.jit
def _load(pointer, at, left, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointer + at, eviction_policy="evict_first").to(COMPUTE)
    else:
        return tl.load(pointer + at, mask=at < left, other=0.0).to(COMPUTE)


@triton.jit
def _store(pointer, at, left, value, DTYPE: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        tl.store(pointer + at, rounded(value, DTYPE), eviction_policy="evict_first")
    else:
        tl.store(pointer + at, rounded(value, DTYPE), mask=at < left)


@triton.jit
def _rate(lr, tensor_lr, TENSOR_LR: tl.constexpr):
    """The learning rate in float64, from the host or from the device."""
    if TENSOR_LR:
        return tl.load(tensor_lr).to(tl.float64)
    else:
        return double(lr)


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
