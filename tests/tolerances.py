"""Every tolerance of the suite, derived: how far two correct implementations may lie apart.

Notation: u is the unit roundoff of a type, half the distance from 1 to the next number (float32 2^-24, float64
2^-53, bfloat16 2^-8, float16 2^-11); eta is half its smallest subnormal number, the error of a result that
underflows. An operation returns x (1 + d) + e with |d| <= u and |e| <= eta. Bounds are first order in u, for any order
of operations and with or without fused multiply-adds; they are multiplied with `SECOND_ORDER` for the rest.
Kernels compute in `opmath` and round to the tensor's type once, when they store.

Errors of sums are compared with the sum of absolute values: relative to the result they have no bound, as it may
cancel to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .inputs import CHUNK, number_in

SECOND_ORDER = 1.01

#: Longest chain of additions inside one chunk, in any implementation: the CPU kernels (`gram_few` in
#: csrc/cpu/chunk_kernels.h) add up a quarter of it in 16 lanes, 262144 / 4 / 16 = 4096 after each other, and what is
#: left over in less than 4; then they join two vectors of 8 lanes (4 additions), and 5 such sums. For more objectives
#: than 3 they add up blocks of 2048: 128 steps, and 128 blocks. Those of a GPU have shorter chunks and more threads,
#: and the reference sums 16384 products by torch's cascade.
GRAM_CHAIN = CHUNK // number_in("cpu/chunk_kernels.h", "kParts") // number_in("cpu/chunk_kernels.h", "kStride") + 16

#: As in reference.EQUAL: squared distances below this share of the squared norms count as zero.
EQUAL = 1e-13


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def underflow(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps / 2


def opmath(dtype: torch.dtype) -> torch.dtype:
    """What elementwise kernels compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def gram_bound(absolute: Tensor, sizes: Sequence[int]) -> Tensor:
    """|error| of G_ij against the exact sum. absolute: [K, K], sum over all elements of |a_i b_i|.

    Products of float32, bfloat16 and float16 are exact in float64, one of float64 rounds once; then each product
    goes through a chain of additions, of at most its chunk's and one more per chunk.
    """
    chunks = sum(-(-n // CHUNK) for n in sizes)
    chain = min(GRAM_CHAIN, sum(sizes)) + chunks
    return SECOND_ORDER * (chain + 1) * unit_roundoff(torch.float64) * absolute


def stored(value: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """|error| after rounding value +- error, computed in opmath, to `dtype`; twice for float64.

    Twice, because float64 results are compared with a float64 reference that errs as much.
    """
    if dtype == torch.float64:
        error = 2 * error
    elif dtype != opmath(dtype):
        error = error + unit_roundoff(dtype) * (value.abs() + error) + underflow(dtype)
    return SECOND_ORDER * error


def combined(grads: Sequence[Tensor], coefficients: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """d = sum_i c_i g_i in float64, and |error| of it in opmath.

    Each term: c_i rounds to opmath, the product rounds, then at most K additions: (K + 2) u sum_i |c_i g_i|.
    """
    terms = torch.stack([c * g.double() for c, g in zip(coefficients.tolist(), grads, strict=True)])
    u, eta = unit_roundoff(opmath(dtype)), underflow(opmath(dtype))
    return terms.sum(0), (len(grads) + 2) * (u * terms.abs().sum(0) + eta)


def correction_error(beta: float, t: int) -> float:
    """Relative |error| of 1 - beta^t in float64, whether beta^t comes from `pow` or by repeated squaring.

    Squaring takes at most 2 log2(t) products, each u off; the difference magnifies that by beta^t / (1 - beta^t).
    """
    power = beta**t
    return (2 * max(t, 1).bit_length() * power / (1 - power) + 1) * unit_roundoff(torch.float64)


def adamw_bounds(
    old: Mapping[str, Tensor], grads: Sequence[Tensor], coefficients: Tensor, t: int, dtype: torch.dtype, **h: float
) -> dict[str, Tensor]:
    """|error| of one AdamW step, for the parameter and each of its states, element by element.

    old: "param", "exp_avg", "exp_avg_sq" and perhaps "max_exp_avg_sq" before the step; t: the step's number; h: lr,
    beta1, beta2, weight_decay, eps. The steps below follow the update rule; e_x is the error of x. The factors count
    the roundings: a constant such as 1 - beta1 rounds once, so do each product, sum, root and quotient.
    """
    u, eta = unit_roundoff(opmath(dtype)), underflow(opmath(dtype))
    p, m, v = (old[name].double() for name in ("param", "exp_avg", "exp_avg_sq"))
    w1, w2 = 1 - h["beta1"], 1 - h["beta2"]
    g, e_g = combined(grads, coefficients, dtype)

    m_new = m + w1 * (g - m)  # torch's lerp turns the formula around for w1 >= 1/2: errors of |g| and |m| alike
    e_m = w1 * e_g + 4 * u * (m.abs() + g.abs()) + 4 * eta
    v_new = (1 - w2) * v + w2 * g * g
    e_v = w2 * (2 * g.abs() * e_g + e_g * e_g) + 4 * u * v_new + 4 * eta
    largest = v_new
    if "max_exp_avg_sq" in old:
        largest = torch.maximum(old["max_exp_avg_sq"].double(), v_new)
    root = largest.sqrt()
    e_root = torch.minimum(e_v / root, e_v.sqrt()).nan_to_num(posinf=0.0) + u * root + eta  # |sqrt a - sqrt b|
    correction = (1 - h["beta2"] ** t) ** 0.5
    denominator = root / correction + h["eps"]
    e_denominator = e_root / correction + 4 * u * denominator + eta
    e_denominator = e_denominator + root / correction * correction_error(h["beta2"], t) / 2  # under a square root
    step_size = h["lr"] / (1 - h["beta1"] ** t)
    quotient = m_new.abs() / denominator
    e_quotient = (e_m + quotient * e_denominator) / (denominator - e_denominator) + u * quotient + eta
    e_quotient = e_quotient.where(e_denominator < denominator / 2, torch.inf)
    e_p = 4 * u * (p.abs() + step_size * quotient) + step_size * e_quotient + 2 * eta
    e_p = e_p + step_size * quotient * correction_error(h["beta1"], t)
    new_p = p.abs() + step_size * quotient
    bounds = {
        "param": stored(new_p, e_p, dtype),
        "exp_avg": stored(m_new, e_m, dtype),
        "exp_avg_sq": stored(v_new, e_v, dtype),
    }
    if "max_exp_avg_sq" in old:
        bounds["max_exp_avg_sq"] = stored(largest, e_v, dtype)
    return bounds


def sgd_bounds(
    old: Mapping[str, Tensor], grads: Sequence[Tensor], coefficients: Tensor, dtype: torch.dtype, **h: float | bool
) -> dict[str, Tensor]:
    """|error| of one SGD step, as `adamw_bounds`. old: "param" and perhaps "momentum_buffer".

    h: lr, momentum, dampening, weight_decay, nesterov, maximize, first.
    """
    u, eta = unit_roundoff(opmath(dtype)), underflow(opmath(dtype))
    p = old["param"].double()
    momentum, w = h["momentum"], 1 - h["dampening"]
    c = -coefficients if h["maximize"] else coefficients
    g, e_g = combined(grads, c, dtype)
    size = g.abs() + h["weight_decay"] * p.abs()
    g = g + h["weight_decay"] * p
    e_g = e_g + 3 * u * size + 2 * eta
    bounds = {}
    if momentum != 0:
        buffer, e_buffer = g, e_g
        if not h["first"]:
            size = momentum * old["momentum_buffer"].double().abs() + w * size
            buffer = momentum * old["momentum_buffer"].double() + w * g
            e_buffer = w * e_g + 4 * u * size + 3 * eta
        bounds["momentum_buffer"] = stored(buffer, e_buffer, dtype)
        if h["nesterov"]:
            size = g.abs() + momentum * size
            g, e_g = g + momentum * buffer, e_g + momentum * e_buffer + 3 * u * size + 2 * eta
        else:
            g, e_g = buffer, e_buffer
    new_p = p - h["lr"] * g
    bounds["param"] = stored(new_p, h["lr"] * e_g + 3 * u * (p.abs() + h["lr"] * size) + 2 * eta, dtype)
    return bounds


#: The same step in float64 with its sums in another order (a batch in parts, objectives swapped, another layout), for
#: the small models of this suite, whose numbers are about 1: gradients are sums of at most 100 products, each u off,
#: and pass through weights whose system has a condition of at most 100 (`weights_bound` of the student's Gram matrix).
REORDERED = 100 * 100 * 2.0**-53


def kkt_gap_bound(gram: Tensor, *, degenerate: bool = False) -> float:
    """How far weights solved from a float64 Gram matrix may be from the optimality condition.

    The condition is <g_i, d> >= ||d||^2 for every i; the gap is how much some i falls short of it.

    Rounding: entries of D_jk = <g_j - g_r, g_k - g_r> err by 4 u max ||g||^2, elimination (stable, as D is positive
    definite) leaves a residual of K times as much on the simplex, and evaluating (G pi)_i and pi^T G pi in the test
    adds K u max ||g||^2 each: (6 K + 2) u max ||g||^2, whatever the condition number.
    degenerate: a corner that is not equal to another but nearer to the others' hull than the threshold,
    sqrt(EQUAL (||g_i||^2 + ||g_r||^2)), may be left out: its <g_i, d> falls short by that distance times ||d||.
    """
    K = len(gram)
    largest = gram.diagonal().max().item()
    rounding = (6 * K + 2) * unit_roundoff(torch.float64) * largest
    return rounding + (2 * EQUAL) ** 0.5 * largest if degenerate else rounding


def weights_bound(gram: Tensor) -> float:
    """|error| of min-norm weights over affinely independent gradients, from the condition of their system.

    D t = b, each entry of the K x K system off by 4 u max ||g||^2: |dt| <= 4 K u max ||g||^2 (1 + |t|) / smallest
    eigenvalue of D, with |t| <= 1 on the simplex; (K + 1) times for elimination's own rounding. D has another form for
    each choice of the base corner; the worst counts.
    """
    K = len(gram)
    if K == 1:
        return 0.0
    worst = 0.0
    largest = gram.diagonal().max()
    for r in range(K):
        others = [i for i in range(K) if i != r]
        D = gram[others][:, others] - gram[others, r][:, None] - gram[r, others][None, :] + gram[r, r]
        worst = max(worst, (largest / torch.linalg.eigvalsh(D)[0]).item())
    return 2 * 4 * K * (K + 1) * unit_roundoff(torch.float64) * worst


def sensitivity(solve: Callable[[Tensor], Tensor], gram: Tensor) -> Tensor:
    """How far rounding may move what is solved from a float64 Gram matrix; of the result's shape.

    A stable solver returns the exact result of a nearby matrix: entries of the unit gradients' matrix err by 4 u, and
    elimination or an orthogonal decomposition adds at most K times as much, so each entry is off by
    4 (K + 1) u ||g_i|| ||g_j||. How far results move is measured with 20 such errors, drawn at random: which way
    they point is chance, so others may do more, 10 times, and the two results that are compared err both.
    """
    K = len(gram)
    norms = gram.diagonal().sqrt()
    size = 4 * (K + 1) * unit_roundoff(torch.float64) * norms[:, None] * norms
    generator = torch.Generator().manual_seed(0)
    nominal = solve(gram)
    moved = torch.zeros_like(nominal)
    for _ in range(20):
        noise = 2 * torch.rand(K, K, generator=generator, dtype=torch.float64) - 1
        moved = torch.maximum(moved, (solve(gram + size * (noise.triu() + noise.triu(1).T)) - nominal).abs())
    return 2 * 10 * moved.max() + 8 * unit_roundoff(torch.float64) * nominal.abs()


def drift(nominal: Sequence[Tensor], shaken: Sequence[Tensor]) -> float:
    """How far rounding may carry two runs of the same training apart.

    nominal, shaken: parameters after the same number of steps; in the shaken run each step was followed by `shake`,
    a rounding error as large as the step bounds above allow. Which way the errors point is chance, so a run that
    rounds otherwise may drift further: 10 times, and never less than the rounding of one step.
    """
    largest = max((a - b).abs().max().item() for a, b in zip(nominal, shaken, strict=True))
    size = max(a.abs().max().item() for a in nominal)
    return 10 * largest + 8 * unit_roundoff(nominal[0].dtype) * size


def shake(params: Sequence[Tensor], generator: torch.Generator) -> None:
    """Moves each element by up to 8 u of the largest: 4 roundings of p, 4 of the step, and the step's coefficients."""
    with torch.no_grad():
        for p in params:
            noise = 2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1
            p.add_(8 * unit_roundoff(p.dtype) * p.abs().max() * noise)
