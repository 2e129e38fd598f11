"""The Triton kernels: the backend of a GPU on which no compiler was at hand when this package was installed.

The functions here have the names and meanings of those in `reference`; `..fused` says which tensors fit the kernels.
They take CUDA tensors, or, where TRITON_INTERPRET=1 was set before this was imported, CPU tensors. The first call of
each kind compiles; none stalls on the device, but the first large update of a kind, which tunes (see NOTE [Tuning]).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import fused, reference
from ..types import Balance, Group, Rescale, Role, Weighting
from ..weighting import DTO
from . import library as _library  # noqa: F401  defines the operations
from .tables import INTERPRETED as INTERPRETED


def gram(grads: Sequence[Sequence[Tensor]]) -> Tensor:
    """`reference.gram` for lists without None, of one dtype."""
    if grads[0][0].dtype not in fused.DTYPES:
        return reference.gram(grads)
    return _grams({Role.SHARED: [(tuple(range(len(grads))), [list(row) for row in grads])]}, len(grads))[Role.SHARED]


def _grams(groups: Mapping[Role, Sequence[Group]], K: int) -> Tensor:
    """[3, K, K] float64: the Gram matrix of each role."""
    call = fused.Groups.by_role(groups)
    return call.run(lambda grads, *shape: torch.ops.dtokd_triton.gram_by_role.default(grads, *shape, K))


def gram_balance(
    groups: Mapping[Role, Sequence[Group]],
    losses: Tensor,
    weighting: Weighting,
    *,
    max_norm: float | None = None,
    rescale: Rescale = "none",
    loss_floor: float = 1e-8,
) -> Balance:
    """Gram matrices of all roles and the `Balance` that follows: two launches, if the weighting is `DTO`.

    That is for gradients of one dtype and reach; others take one more each.
    """
    K = len(losses)
    if type(weighting) is not DTO:
        grams = dict(zip(Role, _grams(groups, K), strict=True))
        return balance(
            grams[Role.SHARED],
            losses,
            weighting,
            max_norm=max_norm,
            rescale=rescale,
            loss_floor=loss_floor,
            private_gram=grams[Role.PRIVATE],
            plain_gram=grams[Role.PLAIN],
        )
    call = fused.Groups.by_role(groups)
    losses = losses.to(call.device, torch.float64)
    options = fused.balance_options(weighting, max_norm, rescale, loss_floor)
    grams, values, flags = call.run(
        lambda grads, *shape: torch.ops.dtokd_triton.gram_balance.default(grads, *shape, K, losses, *options)
    )
    return fused.record(grams[Role.SHARED], values, flags)


def min_norm_weights(gram: Tensor, clamp: bool = True, present: Tensor | None = None) -> Tensor:
    """`reference.min_norm_weights`, in one launch."""
    return torch.ops.dtokd_triton.min_norm_weights.default(gram.double(), clamp, present)


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
    """`reference.balance`, in one launch unless the weighting is another than `DTO`."""
    gram = gram.double()
    losses = losses.to(gram.device, torch.float64)
    weights = None
    if type(weighting) is not DTO:
        weights = reference.weigh(weighting, gram, losses, loss_floor)
    values, flags = torch.ops.dtokd_triton.balance.default(
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
        torch.ops.dtokd_triton.combine_.default(targets, flat, coefficients)

    if not fused.run_fitting(run, grads, [targets]):
        return reference.combine(grads, coefficients, targets)
    return targets


def adamw_step(
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
) -> None:
    """`reference.adamw_step` for tensors of one dtype; state_steps on the parameters' device, else the reference.

    Master copies go through the reference too, as do betas that are tensors on a GPU: only the device knows them.
    """
    number, tensor = _host_or_device(lr, params[0].device)

    def run(flat: list[Tensor]) -> None:
        torch.ops.dtokd_triton.adamw_step_.default(
            params,
            flat,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs if amsgrad else [],
            state_steps,
            coefficients,
            skipped,
            lr=number,
            tensor_lr=tensor,
            beta1=float(beta1),
            beta2=float(beta2),
            weight_decay=weight_decay,
            eps=eps,
            maximize=maximize,
        )

    state = [params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs] if amsgrad else [params, exp_avgs, exp_avg_sqs]
    on_device = any(isinstance(beta, Tensor) and beta.is_cuda for beta in (beta1, beta2))
    if masters or on_device or not fused.run_fitting(run, grads, state):
        reference.adamw_step(
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, coefficients, skipped, lr=lr,
            beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=amsgrad, maximize=maximize,
            masters=masters,
        )  # fmt: skip


def sgd_step(
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
) -> None:
    """`reference.sgd_step` for tensors of one dtype; through it with master copies."""
    number, tensor = _host_or_device(lr, params[0].device)

    def run(flat: list[Tensor]) -> None:
        torch.ops.dtokd_triton.sgd_step_.default(
            params,
            flat,
            momentum_buffers,
            coefficients,
            skipped,
            lr=number,
            tensor_lr=tensor,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            first=first,
        )

    if masters or not fused.run_fitting(run, grads, [params, momentum_buffers] if momentum != 0 else [params]):
        reference.sgd_step(
            params, grads, momentum_buffers, coefficients, skipped, lr=lr, momentum=momentum, dampening=dampening,
            weight_decay=weight_decay, nesterov=nesterov, maximize=maximize, first=first, masters=masters,
        )  # fmt: skip


def _host_or_device(lr: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """A learning rate as what the operations take: a number, or a tensor that the kernel reads."""
    if isinstance(lr, Tensor) and lr.device == device:
        return 0.0, lr
    return float(lr), None
