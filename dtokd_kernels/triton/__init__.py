"""The Triton kernels: the backend of a GPU on which no compiler was at hand when this package was installed.

The functions here have the names and meanings of those in `reference`; `..fused` says which tensors fit the kernels.
They take CUDA tensors, or, where TRITON_INTERPRET=1 was set before this was imported, CPU tensors. The first call of
each kind compiles; none stalls on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import fused, reference
from ..types import Balance, Group, Options, Role, Update
from ..weighting import DTO
from . import library as _library  # noqa: F401  defines the operations
from .tables import INTERPRETED as INTERPRETED

OPS: Any = torch.ops.dtokd_triton


def gram(grads: Sequence[Sequence[Tensor]]) -> Tensor:
    """`reference.gram` for lists without None, of one dtype."""
    if grads[0][0].dtype not in fused.DTYPES:
        return reference.gram(grads)
    return _grams({Role.SHARED: [(tuple(range(len(grads))), [list(row) for row in grads])]}, len(grads))[Role.SHARED]


def _grams(groups: Mapping[Role, Sequence[Group]], K: int) -> Tensor:
    """[3, K, K] float64: the Gram matrix of each role."""
    call = fused.Groups.by_role(groups)
    return call.run(lambda grads, *shape: OPS.gram_by_role.default(grads, *shape, K))


def gram_balance(groups: Mapping[Role, Sequence[Group]], losses: Tensor, options: Options) -> Balance:
    """Gram matrices of all roles and the `Balance` that follows: two launches, if the weighting is `DTO`.

    That is for gradients of one dtype and reach; others take one more each.
    """
    K = len(losses)
    if type(options.weighting) is not DTO:
        return balance(_grams(groups, K), losses, options)
    call = fused.Groups.by_role(groups)
    losses = losses.to(call.device, torch.float64)
    numbers = fused.balance_options(options)
    grams, values, flags = call.run(lambda grads, *shape: OPS.gram_balance.default(grads, *shape, K, losses, *numbers))
    return fused.record(grams[Role.SHARED], values, flags)


def min_norm_weights(gram: Tensor, clamp: bool = True, present: Tensor | None = None) -> Tensor:
    """`reference.min_norm_weights`, in one launch."""
    return OPS.min_norm_weights.default(gram.double(), clamp, present)


def balance(grams: Tensor, losses: Tensor, options: Options) -> Balance:
    """`reference.balance`, in one launch unless the weighting is another than `DTO`."""
    gram, private_gram, plain_gram = grams.double()
    losses = losses.to(gram.device, torch.float64)
    weights = None
    if type(options.weighting) is not DTO:
        weights = reference.weigh(gram, losses, options)
    numbers = fused.balance_options(options)
    values, flags = OPS.balance.default(gram, private_gram, plain_gram, losses, weights, *numbers)
    return fused.record(gram, values, flags)


def combine(
    grads: Sequence[Sequence[Tensor]], coefficients: Tensor, out: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """`reference.combine` for lists without None, of one dtype."""
    return fused.combine(OPS.combine_.default, grads, coefficients, out)


def run_updates(updates: Sequence[Update], table: Tensor, skipped: Tensor) -> None:
    """All updates of one step: those of one rule, reach and dtype, and of one tensor as learning rate, in one launch.

    Master copies go through the reference, as do betas that are tensors on a GPU: only the device knows them.

    Args:
        updates: on one device, in the order in which memory should be walked.
        table: [3, K] float64, a `Balance`'s.
        skipped: scalar bool.
    """
    table = table.to(torch.float64).contiguous()
    fused.run_updates(_together(updates), lambda some: _run(some, table, skipped), table, skipped)


def measure_and_update(updates: Sequence[Update], table: Tensor, skipped: Tensor) -> Tensor:
    """The same, of one role in a launch, and the Gram matrices [3, K, K] of the gradients from the same pass.

    One launch more for each, which adds up what it has left.
    """
    table = table.to(torch.float64).contiguous()
    parts = _together(updates, lambda update: update.role)
    return fused.measure_and_update(parts, lambda some: _run(some, table, skipped, "gram_"), table, skipped)


def _together(updates: Sequence[Update], more: Callable[[Update], object] = lambda _: None) -> list[list[Update]]:
    """The updates that can share a launch."""
    together: dict[tuple[object, ...], list[Update]] = {}
    for update in reversed(updates):  # the kernels walk what they are given from its end
        o, lr = update.options, _device_lr(update)
        flags = [o.get(name) for name in ("maximize", "amsgrad", "nesterov", "first")]
        stateful = [name for name, values in update.state.items() if values]
        key = (update.rule, update.reach, update.params[0].dtype, *flags, *stateful, None if lr is None else id(lr))
        together.setdefault((*key, more(update)), []).append(update)
    return list(together.values())


def _device_lr(update: Update) -> Tensor | None:
    """The learning rate, if it is a tensor that the kernel can read."""
    lr = update.options["lr"]
    return lr if isinstance(lr, Tensor) and lr.device == update.params[0].device else None


def _run(updates: Sequence[Update], table: Tensor, skipped: Tensor, prefix: str = "") -> Any:
    """Run updates that can share a launch by their rule's operation, or the one with this prefix; what that returns.

    Raises:
        RuntimeError: `fused.UNFIT`, with nothing changed: some tensor fits no kernel.
    """
    if fused.has_betas_on_device(updates) or any(update.state.get("masters") for update in updates):
        raise RuntimeError(f"{fused.UNFIT}: master copies, or a beta that is a tensor on a GPU")
    first = updates[0]
    o, lr = first.options, _device_lr(first)
    reach = sum(1 << i for i in first.reach)
    lists = [[g for update in updates for g in update.grads[k]] for k in range(len(first.reach))]
    params = [p for update in updates for p in update.params]
    names = _STATE[first.rule]
    state = {name: [t for update in updates for t in update.state.get(name, ())] for name in names}
    counts = [len(update.params) for update in updates]
    numbers = [
        float(number)
        for update in updates
        for number in (
            update.role,
            0.0 if lr is not None else update.options["lr"],
            *(update.options[name] for name in _NUMBERS[first.rule]),
        )
    ]
    operation = getattr(OPS, prefix + fused.OPERATIONS[first.rule]).default
    flags = [o[name] for name in _FLAGS[first.rule]]
    return fused.run_fitting(
        lambda flat: operation(params, flat, *state.values(), counts, reach, table, skipped, lr, numbers, *flags),
        lists,
        [params, *state.values()],
    )


#: The lists of state of each rule, the numbers of a parameter group, and what all groups of a call have in common, as
#: its operation takes them.
_STATE = {
    "adamw_step": ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"),
    "sgd_step": ("momentum_buffers",),
}
_NUMBERS = {
    "adamw_step": ("beta1", "beta2", "weight_decay", "eps"),
    "sgd_step": ("momentum", "dampening", "weight_decay"),
}
_FLAGS = {"adamw_step": ("maximize",), "sgd_step": ("nesterov", "maximize", "first")}
