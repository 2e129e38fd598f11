"""The operations that torch sees: `dtokd_triton::min_norm_weights`, ... with the schemas of `csrc/torch/library.cpp`.

`gram_by_role` and `gram_balance` are those of `csrc/torch/cuda_library.cpp`, without its tickets. An update takes
parameter groups of one reach, and `tensor_lr`, a learning rate on the device, in the place of the groups' own.
Defined by `Library.define` with fake kernels of their own: torch.compile keeps each as one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import fakes, fused
from . import solve, update
from .gram import Member
from .gram import gram_by_role as launch_gram_by_role
from .tables import INTERPRETED

_LIBRARY = torch.library.Library("dtokd_triton", "DEF")
_SCHEMAS = (
    "gram_by_role(Tensor[] grads, int[] counts, int[] roles, int[] reaches, int K) -> Tensor",
    "gram_balance(Tensor[] grads, int[] counts, int[] roles, int[] reaches, int K, Tensor losses, "
    "bool log_gradients, bool clamp, bool rescale_sum, float max_norm, float loss_floor, float limit) -> "
    "(Tensor, Tensor, Tensor)",
    "min_norm_weights(Tensor gram, bool clamp, Tensor? present) -> Tensor",
    "balance(Tensor gram, Tensor? private_gram, Tensor? plain_gram, Tensor losses, Tensor? weights, "
    "bool log_gradients, bool clamp, bool rescale_sum, float max_norm, float loss_floor, float limit) -> "
    "(Tensor, Tensor)",
    "combine_(Tensor(a!)[] out, Tensor[] grads, Tensor coefficients) -> ()",
    "adamw_updates_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, int[] counts, int reach, Tensor table, Tensor skipped, "
    "Tensor? tensor_lr, float[] numbers, bool maximize) -> ()",
    "sgd_updates_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, int[] counts, int reach, "
    "Tensor table, Tensor skipped, Tensor? tensor_lr, float[] numbers, bool nesterov, bool maximize, bool first) -> ()",
    "gram_adamw_updates_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, int[] counts, int reach, Tensor table, Tensor skipped, "
    "Tensor? tensor_lr, float[] numbers, bool maximize) -> Tensor",
    "gram_sgd_updates_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, int[] counts, int reach, "
    "Tensor table, Tensor skipped, Tensor? tensor_lr, float[] numbers, bool nesterov, bool maximize, bool first) "
    "-> Tensor",
)


def _gradients(op: str, like: Sequence[Tensor], grads: Sequence[Tensor], K: int) -> list[Sequence[Tensor]]:
    T = len(like)
    if len(grads) != K * T:
        raise ValueError(f"dtokd_triton::{op}: grads has {len(grads)} tensors, expected {T} for each of {K} objectives")
    lists = [grads[k * T : (k + 1) * T] for k in range(K)]
    for values in lists:
        _check_list(op, "grads", values, like)
    return lists


def _check_like(op: str, like: Sequence[Tensor]) -> None:
    for t, tensor in enumerate(like):
        if tensor.dtype != like[0].dtype or tensor.dtype not in fused.DTYPES:
            raise RuntimeError(f"{fused.UNFIT}: {op}: tensor {t} is {tensor.dtype}")
        if not (tensor.is_contiguous() or fused.is_dense(tensor)):
            raise RuntimeError(f"{fused.UNFIT}: {op}: tensor {t} is not dense")


def _check_list(op: str, name: str, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """Whether the tensors lie in memory as `like` does; kernels see addresses only, so nothing else would notice."""
    if len(tensors) != len(like):
        raise ValueError(f"dtokd_triton::{op}: {name} has {len(tensors)} tensors, expected {len(like)}")
    for t, (tensor, model) in enumerate(zip(tensors, like, strict=True)):
        if tensor.shape != model.shape:
            raise ValueError(
                f"{op}: {name}[{t}] has shape {list(tensor.shape)}, expected {list(model.shape)} as its parameter; "
                "gradients and state must be those of the same parameters, in the same order"
            )
        if tensor.dtype != model.dtype or tensor.device != model.device:
            raise RuntimeError(f"{fused.UNFIT}: {op}: {name}[{t}] is {tensor.dtype} on {tensor.device}")
        if not (tensor.is_contiguous() and model.is_contiguous()) and tensor.stride() != model.stride():
            raise RuntimeError(f"{fused.UNFIT}: {op}: {name}[{t}] is laid out otherwise")


def _members(
    op: str, grads: Sequence[Tensor], counts: Sequence[int], roles: Sequence[int], reaches: Sequence[int]
) -> list[Member]:
    """Groups of gradients, cut out of one list: `counts` tensors for each objective in `reaches`."""
    members, start = [], 0
    for count, role, reach in zip(counts, roles, reaches, strict=True):
        objectives = reach.bit_count()
        values = grads[start : start + count * objectives]
        start += len(values)
        _check_like(op, values[:count])
        members.append(Member(role, reach, _gradients(op, values[:count], values, objectives)))
    if start != len(grads):
        raise ValueError(f"dtokd_triton::{op}: grads has {len(grads)} tensors, expected {start}")
    return members


def gram_by_role(
    grads: Sequence[Tensor], counts: Sequence[int], roles: Sequence[int], reaches: Sequence[int], K: int
) -> Tensor:
    """Gram matrices of groups of gradients, one for each role."""
    members = _members("gram_by_role", grads, counts, roles, reaches)
    with torch.cuda.device_of(grads[0]):
        return launch_gram_by_role(members, K)


def gram_balance(
    grads: Sequence[Tensor],
    counts: Sequence[int],
    roles: Sequence[int],
    reaches: Sequence[int],
    K: int,
    losses: Tensor,
    log_gradients: bool,
    clamp: bool,
    rescale_sum: bool,
    max_norm: float,
    loss_floor: float,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and their balance with DTO's weights."""
    members = _members("gram_balance", grads, counts, roles, reaches)
    losses = _doubles("gram_balance", losses, grads[0])
    with torch.cuda.device_of(grads[0]):
        return solve.gram_balance(members, K, losses, log_gradients, clamp, rescale_sum, max_norm, loss_floor, limit)


def min_norm_weights(gram: Tensor, clamp: bool, present: Tensor | None) -> Tensor:
    """`reference.min_norm_weights`."""
    with torch.cuda.device_of(gram):
        return solve.min_norm_weights(
            _doubles("min_norm_weights", gram, gram), clamp, None if present is None else present.contiguous()
        )


def balance(
    gram: Tensor,
    private_gram: Tensor | None,
    plain_gram: Tensor | None,
    losses: Tensor,
    weights: Tensor | None,
    log_gradients: bool,
    clamp: bool,
    rescale_sum: bool,
    max_norm: float,
    loss_floor: float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """`reference.balance`, as values and flags that `fused.record` unpacks."""
    op = "balance"
    with torch.cuda.device_of(gram):
        return solve.balance(
            _doubles(op, gram, gram),
            None if private_gram is None else _doubles(op, private_gram, gram),
            None if plain_gram is None else _doubles(op, plain_gram, gram),
            _doubles(op, losses, gram),
            None if weights is None else _doubles(op, weights, gram),
            log_gradients,
            clamp,
            rescale_sum,
            max_norm,
            loss_floor,
            limit,
        )


def combine_(out: Sequence[Tensor], grads: Sequence[Tensor], coefficients: Tensor) -> None:
    """`reference.combine` into `out`."""
    _check_like("combine_", out)
    lists = _gradients("combine_", out, grads, len(coefficients))
    with torch.cuda.device_of(out[0]):
        update.combine(out, lists, _doubles("combine_", coefficients, out[0]))


def _descent(
    op: str,
    measured: bool,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    counts: Sequence[int],
    reach: int,
    table: Tensor,
    skipped: Tensor,
    tensor_lr: Tensor | None,
    numbers: Sequence[float],
) -> update.Descent:
    _check_like(op, params)
    lists = _gradients(op, params, grads, reach.bit_count())
    groups = tuple([group for group, count in enumerate(counts) for _ in range(count)])
    if len(groups) != len(params):
        raise ValueError(f"dtokd_triton::{op}: counts add up to {len(groups)}, but there are {len(params)} params")
    if measured and len(set(numbers[:: len(numbers) // len(counts)])) > 1:
        raise ValueError(f"dtokd_triton::{op}: the groups have several roles; call it once for each")
    table = _doubles(op, table, params[0])
    return update.Descent(params, lists, groups, reach, table, skipped, tensor_lr, tuple(numbers))


def adamw_updates_(params: Sequence[Tensor], grads: Sequence[Tensor], *arguments: Any) -> None:
    """`reference.adamw_step` of parameter groups of `counts` tensors; see `update.Descent`."""
    _adamw("adamw_updates_", False, params, grads, *arguments)


def gram_adamw_updates_(params: Sequence[Tensor], grads: Sequence[Tensor], *arguments: Any) -> Tensor:
    """The same, of groups of one role, and the Gram matrices [3, K, K] of their gradients from the same pass."""
    grams = _adamw("gram_adamw_updates_", True, params, grads, *arguments)
    assert grams is not None
    return grams


def _adamw(
    op: str,
    measured: bool,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    counts: Sequence[int],
    reach: int,
    table: Tensor,
    skipped: Tensor,
    tensor_lr: Tensor | None,
    numbers: Sequence[float],
    maximize: bool,
) -> Tensor | None:
    descent = _descent(op, measured, params, grads, counts, reach, table, skipped, tensor_lr, numbers)
    states = [exp_avgs, exp_avg_sqs, max_exp_avg_sqs] if max_exp_avg_sqs else [exp_avgs, exp_avg_sqs]
    for name, values in zip(("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"), states, strict=False):
        _check_list(op, name, values, params)
    if len(state_steps) != len(params):
        raise ValueError(f"dtokd_triton::{op}: state_steps has {len(state_steps)} tensors, expected {len(params)}")
    step = state_steps[0]
    if any(s.dtype != step.dtype or s.device != params[0].device or s.numel() != 1 for s in state_steps) or (
        step.dtype not in (torch.float32, torch.float64)
    ):
        raise RuntimeError(f"{fused.UNFIT}: {op}: state_steps must be float scalars beside the parameters")
    with torch.cuda.device_of(params[0]):
        return update.adamw_step(descent, states, state_steps, maximize, measured)


def sgd_updates_(params: Sequence[Tensor], grads: Sequence[Tensor], *arguments: Any) -> None:
    """`reference.sgd_step`, as `adamw_updates_`."""
    _sgd("sgd_updates_", False, params, grads, *arguments)


def gram_sgd_updates_(params: Sequence[Tensor], grads: Sequence[Tensor], *arguments: Any) -> Tensor:
    """The same, as `gram_adamw_updates_`."""
    grams = _sgd("gram_sgd_updates_", True, params, grads, *arguments)
    assert grams is not None
    return grams


def _sgd(
    op: str,
    measured: bool,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    counts: Sequence[int],
    reach: int,
    table: Tensor,
    skipped: Tensor,
    tensor_lr: Tensor | None,
    numbers: Sequence[float],
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> Tensor | None:
    descent = _descent(op, measured, params, grads, counts, reach, table, skipped, tensor_lr, numbers)
    if momentum_buffers:
        _check_list(op, "momentum_buffers", momentum_buffers, params)
    with torch.cuda.device_of(params[0]):
        return update.sgd_step(descent, momentum_buffers, nesterov, maximize, first, measured)


def _doubles(op: str, tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.dtype != torch.float64 or tensor.device != like.device:
        raise ValueError(
            f"dtokd_triton::{op}: expected float64 numbers on {like.device}, got {tensor.dtype} on {tensor.device}"
        )
    return tensor.contiguous()


def _register(implementations: Sequence[Callable[..., object]]) -> None:
    for schema, function in zip(_SCHEMAS, implementations, strict=True):
        _LIBRARY.define(schema)
        for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            _LIBRARY.impl(schema.split("(")[0], function, key)
    fakes.register("dtokd_triton")


_register(
    (
        gram_by_role,
        gram_balance,
        min_norm_weights,
        balance,
        combine_,
        adamw_updates_,
        sgd_updates_,
        gram_adamw_updates_,
        gram_sgd_updates_,
    )
)
