"""The C++ extension: loads it, remembers why it could not, and declares its operations to torch.

The functions here have the names and meanings of those in `reference`; `fused` says which tensors fit the kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import fused, reference
from .solvers import solved_by
from .types import Balance, Rescale, Weighting
from .weighting import DTO
from .weighting._random import signed


def load(name: str, needs: str) -> str | None:
    """Load a library of operations that lies beside this file; returns why it cannot be used, or None.

    Args:
        name: of the library, such as "_C".
        needs: what building it takes, for the reason.
    """
    # beside this file only: an editable install elsewhere would offer its own
    spec = PathFinder.find_spec(f"{__package__}.{name}", [str(Path(__file__).parent)])
    if spec is None or spec.origin is None:
        return f"it was not built (no torch or no {needs} when the package was installed, or DTOKD_BUILD excludes it)"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"its library does not load: {error.__cause__ or error}"
    return None


#: Why the extension cannot be used, or None.
missing: str | None = load("_C", "C++ compiler")
if missing is None:
    fused.register_fakes("dtokd")
    fused.register_gram_step_fakes("dtokd")
    fused.register_writing_fakes("dtokd", "adamw_step_", "sgd_step_")
    fused.register_solver_fakes("dtokd")


def instructions() -> str:
    """The vector instructions that the kernels use on this machine."""
    if missing is not None:
        return "none"
    return bytes(torch.ops.dtokd.instructions.default(torch.empty(0, device="cpu")).tolist()).decode()


def gram(grads: Sequence[Sequence[Tensor]]) -> Tensor:
    """`reference.gram` for lists without None, of one dtype."""
    try:
        return torch.ops.dtokd.gram.default(fused.flat(grads), len(grads))
    except RuntimeError as error:
        if not fused.is_unfit(error):
            raise
    if grads[0][0].dtype not in fused.DTYPES:
        return reference.gram(grads)
    return torch.ops.dtokd.gram.default(fused.flat(fused.laid_out(grads, fused.dense(grads[0]))), len(grads))


def min_norm_weights(gram: Tensor, clamp: bool = True, present: Tensor | None = None) -> Tensor:
    """`reference.min_norm_weights`."""
    return torch.ops.dtokd.min_norm_weights.default(gram.double().contiguous(), clamp, present)


def dual_cone_weights(gram: Tensor, each: bool) -> Tensor:
    """The solver of this name (`solvers`), of `UPGrad` and `DualProj`."""
    return torch.ops.dtokd.dual_cone_weights.default(gram.contiguous(), each)


def cagrad_weights(gram: Tensor, c: float) -> Tensor:
    """The solver of this name."""
    return torch.ops.dtokd.cagrad_weights.default(gram.contiguous(), c)


def nash_weights(gram: Tensor) -> Tensor:
    """The solver of this name."""
    return torch.ops.dtokd.nash_weights.default(gram.contiguous())


def pcgrad_weights(gram: Tensor, step: Tensor, seed: int) -> Tensor:
    """The solver of this name; its random orders are those of the one in Python."""
    return torch.ops.dtokd.pcgrad_weights.default(gram.contiguous(), step, signed(seed % 2**64))


def balance(
    gram: Tensor,
    losses: Tensor,
    weighting: Weighting,
    *,
    max_norm: float | None = None,
    rescale: Rescale = "none",
    loss_floor: float = 1e-8,
    private_gram: Tensor | None = None,
    plain_gram: Tensor | None = None,
) -> Balance:
    """`reference.balance`, in one call unless the weighting is another than `DTO`."""
    gram = gram.double().contiguous()
    losses = losses.to(torch.float64).contiguous()
    weights = None
    if type(weighting) is not DTO:
        with solved_by(sys.modules[__name__]):
            weights = reference.weigh(weighting, gram, losses, loss_floor).contiguous()
    values, flags = torch.ops.dtokd.balance.default(
        gram,
        private_gram,
        plain_gram,
        losses,
        weights,
        *fused.balance_options(weighting, max_norm, rescale, loss_floor),
    )
    return fused.record(gram, values, flags)


def combine(
    grads: Sequence[Sequence[Tensor]], coefficients: Tensor, out: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """`reference.combine` for lists without None, of one dtype."""
    targets = [torch.empty_like(g) for g in grads[0]] if out is None else list(out)

    def run(flat: list[Tensor]) -> None:
        torch.ops.dtokd.combine_.default(targets, flat, coefficients)

    if not fused.run_fitting(run, grads, [targets]):
        return reference.combine(grads, coefficients, targets)
    return targets


def adamw_step(params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], *args: Any, **options: Any) -> None:
    """`reference.adamw_step` for tensors of one dtype."""
    _adamw("adamw_step", params, grads, *args, **options)


def gram_adamw_step(params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], *args: Any, **options: Any) -> Tensor:
    """`reference.gram_adamw_step` for tensors of one dtype: one pass over the gradients."""
    return _adamw("gram_adamw_step", params, grads, *args, **options)  # type: ignore[return-value]


def _adamw(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    coefficients: Tensor,
    skipped: Tensor,
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    masters: Sequence[Tensor] = (),
) -> Tensor | None:
    products: Tensor | None = None

    def run(flat: list[Tensor]) -> None:
        nonlocal products
        products = getattr(torch.ops.dtokd, f"{name}_").default(
            params,
            flat,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            state_steps,
            coefficients,
            skipped,
            lr=float(lr),
            beta1=float(beta1),
            beta2=float(beta2),
            weight_decay=weight_decay,
            eps=eps,
            maximize=maximize,
        )

    state = [params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs] if amsgrad else [params, exp_avgs, exp_avg_sqs]
    if masters or not fused.run_fitting(run, grads, state):
        return getattr(reference, name)(
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, coefficients, skipped, lr=lr,
            beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=amsgrad, maximize=maximize,
            masters=masters,
        )  # fmt: skip
    return products


def sgd_step(params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], *args: Any, **options: Any) -> None:
    """`reference.sgd_step` for tensors of one dtype."""
    _sgd("sgd_step", params, grads, *args, **options)


def gram_sgd_step(params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], *args: Any, **options: Any) -> Tensor:
    """`reference.gram_sgd_step` for tensors of one dtype: one pass over the gradients."""
    return _sgd("gram_sgd_step", params, grads, *args, **options)  # type: ignore[return-value]


def _sgd(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    momentum_buffers: Sequence[Tensor],
    coefficients: Tensor,
    skipped: Tensor,
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    masters: Sequence[Tensor] = (),
) -> Tensor | None:
    products: Tensor | None = None

    def run(flat: list[Tensor]) -> None:
        nonlocal products
        products = getattr(torch.ops.dtokd, f"{name}_").default(
            params,
            flat,
            momentum_buffers,
            coefficients,
            skipped,
            lr=float(lr),
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            first=first,
        )

    if masters or not fused.run_fitting(run, grads, [params, momentum_buffers] if momentum != 0 else [params]):
        return getattr(reference, name)(
            params, grads, momentum_buffers, coefficients, skipped, lr=lr, momentum=momentum, dampening=dampening,
            weight_decay=weight_decay, nesterov=nesterov, maximize=maximize, first=first, masters=masters,
        )  # fmt: skip
    return products
