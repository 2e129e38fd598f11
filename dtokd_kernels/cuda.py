"""The CUDA extension: the functions of `reference` for tensors on a GPU, and two that take a whole step's work.

`gram_balance` makes all Gram matrices and the weights in one launch, `run_updates` updates all parameter groups in
another, `run_step` does both in one for small models. Nothing here waits for the device. `fused` says which tensors
fit the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import fakes, fused, native, reference
from .types import Balance, Group, Options, Role, Update
from .weighting import DTO

RESIDENT_PARAMETERS = 4096 * 4096  # kMaxWholeChunks tiles in csrc/cuda/plan.h: above, `run_step` need not ask


OPS: Any = torch.ops.dtokd_cuda


def _load() -> str | None:
    reason = native.missing or native.load("_cuda", "nvcc")
    if reason is None:
        fakes.register("dtokd_cuda")
    return reason


#: Why the extension cannot be used, or None. It loads without a GPU too.
missing: str | None = _load()


def gram(grads: Sequence[Sequence[Tensor]]) -> Tensor:
    """`reference.gram` for lists without None, of one dtype."""
    if grads[0][0].dtype not in fused.DTYPES:
        return reference.gram(grads)
    return _grams({Role.SHARED: [(tuple(range(len(grads))), [list(row) for row in grads])]}, len(grads))[Role.SHARED]


def min_norm_weights(gram: Tensor, clamp: bool = True, present: Tensor | None = None) -> Tensor:
    """`reference.min_norm_weights`."""
    return OPS.min_norm_weights.default(gram.double().contiguous(), clamp, present)


def balance(grams: Tensor, losses: Tensor, options: Options) -> Balance:
    """`reference.balance`, in one launch after the weighting, if that is another than `DTO`."""
    grams = grams.double().contiguous()
    gram = grams[Role.SHARED]
    losses = losses.to(grams.device, torch.float64).contiguous()
    weights = None
    if type(options.weighting) is not DTO:
        weights = reference.weigh(gram, losses, options).contiguous()
    values, flags = OPS.balance_by_role.default(grams, losses, weights, *fused.balance_options(options))
    return fused.record(gram, values, flags)


def gram_balance(groups: Mapping[Role, Sequence[Group]], losses: Tensor, options: Options) -> Balance:
    """Gram matrices of all roles and the `Balance` that follows: one launch, if the weighting is `DTO`."""
    K = len(losses)
    if type(options.weighting) is not DTO:
        return balance(_grams(groups, K), losses, options)
    call = fused.Groups.by_role(groups)
    losses = losses.to(call.device, torch.float64).contiguous()
    numbers = fused.balance_options(options)
    grams, values, flags = call.run(
        lambda grads, *shape: OPS.gram_balance.default(grads, *shape, K, losses, *numbers, fused.tickets(call.device))
    )
    return fused.record(grams[Role.SHARED], values, flags)


def combine(
    grads: Sequence[Sequence[Tensor]], coefficients: Tensor, out: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """`reference.combine` for lists without None, of one dtype."""
    coefficients = coefficients.to(grads[0][0].device, torch.float64).contiguous()
    return fused.combine(OPS.combine_.default, grads, coefficients, out)


def run_updates(updates: Sequence[Update], table: Tensor, skipped: Tensor) -> None:
    """All updates of one step: one launch for each rule and dtype, whatever the number of parameter groups.

    Args:
        updates: on one device, in the order in which memory should be walked.
        table: [3, K] float64, a `Balance`'s.
        skipped: scalar bool.
    """
    fused.run_updates(_by_rule(updates), lambda some: _run(some, table, skipped), table, skipped)


def measure_and_update(updates: Sequence[Update], table: Tensor, skipped: Tensor) -> Tensor:
    """The same, and the Gram matrices [3, K, K] of the gradients from the same launches."""
    return fused.measure_and_update(_by_rule(updates), lambda some: _run(some, table, skipped, "gram_"), table, skipped)


def _by_rule(updates: Sequence[Update]) -> list[list[Update]]:
    # the kernels walk what they are given from its end
    in_order = list(reversed(updates))
    return [same for rule in _STATE if (same := [update for update in in_order if update.rule == rule])]


def run_step(updates: Sequence[Update], losses: Tensor, options: Options) -> Balance | None:
    """`gram_balance` and `run_updates` in one launch that reads the gradients once, for small models.

    Args:
        updates: all of the step, in the order in which memory should be walked.
        losses: [K].
        options: of the balance.

    Returns:
        The `Balance`; None, with nothing changed, where such a launch does not fit: other rules than AdamW without
        amsgrad, K > 2, another weighting than `DTO`, or more parameters than the chip holds gradients of.
    """
    plain = all(u.rule == "adamw_step" and not u.options["amsgrad"] and not u.state.get("masters") for u in updates)
    small = sum(p.numel() for u in updates for p in u.params) <= RESIDENT_PARAMETERS
    if not (plain and small and len(losses) <= 2 and type(options.weighting) is DTO) or fused.has_betas_on_device(
        updates
    ):
        return None
    in_order = list(reversed(updates))
    call = _Call("adamw_step", in_order)
    losses = losses.to(call.device, torch.float64).contiguous()
    numbers = fused.balance_options(options)
    exp_avgs, exp_avg_sqs, _, steps, _ = call.state
    try:
        grams, values, flags = call.groups.run(
            lambda grads, *shape: OPS.resident_adamw_.default(
                call.params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                steps,
                *shape,
                losses,
                *numbers,
                call.lrs,
                call.numbers,
                fused.tickets(call.device),
            ),
            like=call.params,
        )
    except RuntimeError as error:
        if not fused.is_unfit(error):
            raise
        return None
    if grams.numel() == 0:
        return None
    call.count_writes()
    return fused.record(grams[Role.SHARED], values, flags)


#: The lists of state of each rule, as its operation takes them.
_STATE = {
    "adamw_step": ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps", "masters"),
    "sgd_step": ("momentum_buffers", "masters"),
}


class _Call:
    """Updates of one rule as its operation takes them."""

    def __init__(self, rule: str, updates: Sequence[Update]) -> None:
        self.params = [p for update in updates for p in update.params]
        self.device = self.params[0].device
        self.lrs: list[Tensor] = []
        self.numbers = [number for update in updates for number in _numbers(rule, update, self.device, self.lrs)]
        self.state = [[t for update in updates for t in update.state.get(name, ())] for name in _STATE[rule]]
        self.groups = fused.Groups([(update.role, update.reach, update.grads) for update in updates])

    def count_writes(self) -> None:
        """Let autograd know that parameters and state have changed."""
        for tensors in (self.params, *self.state):
            increment_version(tensors)


def _run(updates: Sequence[Update], table: Tensor, skipped: Tensor, prefix: str = "") -> Any:
    """Run updates of one rule together by its operation, or the one with this prefix; what that returns.

    Raises:
        RuntimeError: `fused.UNFIT`, with nothing changed: some tensor fits no kernel.
    """
    if fused.has_betas_on_device(updates):
        raise RuntimeError(f"{fused.UNFIT}: a beta is a tensor on a GPU")
    rule = updates[0].rule
    call = _Call(rule, updates)
    table = table.to(torch.float64).contiguous()
    operation = getattr(OPS, prefix + fused.OPERATIONS[rule]).default
    tickets = [fused.tickets(call.device)] if prefix or rule == "adamw_step" else []

    def run(grads: list[Tensor], *shape: list[int]) -> Any:
        return operation(call.params, grads, *call.state, *shape, table, skipped, call.lrs, call.numbers, *tickets)

    result = call.groups.run(run, like=call.params)
    call.count_writes()
    return result


def _numbers(rule: str, update: Update, device: torch.device, lrs: list[Tensor]) -> list[float]:
    """An update's options as csrc/torch/cuda_library.cpp reads them; a learning rate on the device goes to `lrs`."""
    o = update.options
    lr, index = o["lr"], -1
    if isinstance(lr, Tensor) and lr.device == device and lr.dtype in (torch.float32, torch.float64):
        lr, index = 0.0, len(lrs)
        lrs.append(o["lr"])
    numbers = [float(lr), index]
    if rule == "adamw_step":
        numbers += [float(o["beta1"]), float(o["beta2"]), o["weight_decay"], o["eps"], o["maximize"], o["amsgrad"]]
    else:
        numbers += [o["momentum"], o["dampening"], o["weight_decay"], o["nesterov"], o["maximize"], o["first"]]
    return [float(n) for n in (*numbers, bool(update.state.get("masters")))]


def _grams(groups: Mapping[Role, Sequence[Group]], K: int) -> Tensor:
    """[3, K, K] float64: the Gram matrix of each role."""
    call = fused.Groups.by_role(groups)
    return call.run(lambda grads, *shape: OPS.gram_by_role.default(grads, *shape, K, fused.tickets(call.device)))
