"""The operations of `operations` in Triton: schemas and meanings are those of the libraries in C++.

Registered for CUDA tensors, or, where TRITON_INTERPRET=1 was set before this was imported, for CPU tensors too. The
first call of each kind compiles; none waits for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import operations, reference
from ..implementations import TICKETS, Kernels, is_dense
from ..rules import RULES, Rule
from . import solve, update
from .gram import Member
from .gram import gram_by_role as launch_gram
from .tables import INTERPRETED

KERNELS = Kernels("triton", "dtokd_triton", device_lr=True)


def _laid_out(op: str, t: int, g: Tensor, like: Tensor) -> Tensor:
    """A gradient as its row lies in memory: itself or a copy. Kernels see addresses only: nothing else would notice."""
    if g.shape != like.shape:
        raise ValueError(
            f"{op}: grads[{t}] has shape {list(g.shape)}, expected {list(like.shape)} as its parameter; gradients and "
            "state must be those of the same parameters, in the same order"
        )
    if g.dtype != like.dtype or g.device != like.device:
        raise ValueError(f"{op}: grads of row {t} are {g.dtype} on {g.device}, expected {like.dtype} on {like.device}")
    if (g.is_contiguous() and like.is_contiguous()) or (g.stride() == like.stride() and is_dense(g)):
        return g
    return torch.empty_like(like).copy_(g)


def _columns(
    op: str, grads: Sequence[Tensor], reach: Sequence[int], likes: Sequence[Tensor] | None = None
) -> list[list[Tensor]]:
    """The gradients of each row, laid out as `likes`, or as the first of them."""
    columns, start = [], 0
    for t, mask in enumerate(reach):
        end = start + mask.bit_count()
        if end > len(grads):
            raise ValueError(f"{op}: grads has {len(grads)} tensors, expected more, as reach says")
        column = grads[start:end]
        like = column[0] if likes is None else likes[t]
        if likes is None and not is_dense(like):
            like = like.contiguous()
        columns.append([_laid_out(op, t, g, like) for g in column])
        start = end
    if start != len(grads):
        raise ValueError(f"{op}: grads has {len(grads)} tensors, expected {start}, as reach says")
    return columns


def _members(op: str, grads: Sequence[Tensor], reach: Sequence[int], role: Sequence[int]) -> list[Member]:
    """Rows that one launch can take, together: of one role, reach and dtype."""
    members: dict[tuple[int, int, torch.dtype], list[list[Tensor]]] = {}
    for mask, r, column in zip(reach, role, _columns(op, grads, reach), strict=True):
        members.setdefault((r, mask, column[0].dtype), []).append(column)
    in_order = sorted(members.items(), key=lambda item: item[0][0])
    return [Member(r, mask, list(zip(*columns, strict=True))) for (r, mask, _), columns in in_order]


def gram(grads: Sequence[Tensor], reach: Sequence[int], role: Sequence[int], K: int, tickets: Tensor | None) -> Tensor:
    """A launch for each role, reach and dtype, and one more."""
    with torch.cuda.device_of(grads[0]):
        return launch_gram(_members("gram", grads, reach, role), K)


def gram_balance(
    grads: Sequence[Tensor], reach: Sequence[int], role: Sequence[int], losses: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and DTO-KD's weights by the last program of the last launch. After the options come the tickets."""
    losses = _doubles("gram_balance", losses, grads[0])
    with torch.cuda.device_of(grads[0]):
        return solve.gram_balance(_members("gram_balance", grads, reach, role), losses, *options[:-1])


def min_norm_weights(gram: Tensor, clamp: bool, present: Tensor | None) -> Tensor:
    """One launch."""
    gram = _doubles("min_norm_weights", gram, gram)
    with torch.cuda.device_of(gram):
        return solve.min_norm_weights(gram, clamp, None if present is None else present.contiguous())


def balance(
    grams: Tensor,
    losses: Tensor,
    weights: Tensor | None,
    losses_before: Tensor | None,
    squares: Tensor | None,
    roles: int,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """One launch; where weights are those of `losses_before` one more, and torch's for `squares`."""
    grams, losses = _doubles("balance", grams, grams), _doubles("balance", losses, grams)
    weights = None if weights is None else _doubles("balance", weights, grams)
    with torch.cuda.device_of(grams):
        if squares is not None:
            grams = reference.of_present(grams, squares)
        if weights is None and losses_before is not None:
            before = _doubles("balance", losses_before, grams)
            weights = solve.balance(grams, before, None, *options)[0][: len(losses)]
        values, flags = solve.balance(grams, losses, weights, *options)
        if squares is not None:
            K = len(losses)
            flags[1] |= ~reference.is_bounded(squares, values[K : 4 * K].view(3, K), roles, options[-1])
    return values, flags


def combine_(
    out: Sequence[Tensor], grads: Sequence[Tensor], reach: Sequence[int], role: Sequence[int], coefficients: Tensor
) -> None:
    """A launch for each role, reach and dtype."""
    if not out:
        return
    coefficients = _doubles("combine_", coefficients, out[0])
    together: dict[tuple[int, int, torch.dtype], list[tuple[Tensor, list[Tensor]]]] = {}
    columns = _columns("combine_", grads, reach, out)
    for target, column, mask, r in zip(out, columns, reach, role, strict=True):
        together.setdefault((r, mask, target.dtype), []).append((target, column))
    with torch.cuda.device_of(out[0]):
        for (r, mask, _), pairs in together.items():
            targets, rows = zip(*pairs, strict=True)
            update.combine(targets, list(zip(*rows, strict=True)), mask, coefficients[r].contiguous())


class _Prepared(NamedTuple):
    """What a number stands for: rows as `prepare` takes them, the state of each by its slot."""

    rule: Rule
    params: list[Tensor]
    state: list[dict[int, Tensor]]
    reach: list[int]
    role: list[int]
    group: list[int]


_prepared: dict[int, _Prepared] = {}
_numbers = itertools.count(1)


def prepare(
    rule: int,
    params: Sequence[Tensor],
    state: Sequence[Tensor],
    reach: Sequence[int],
    role: Sequence[int],
    group: Sequence[int],
    held: Sequence[int],
) -> int:
    """Checks rows, and keeps them until `release`."""
    expected = sum(mask.bit_count() for mask in held)
    if len(state) != expected:
        raise ValueError(f"prepare: state has {len(state)} tensors, expected {expected}, as held says")
    if not len(params) == len(reach) == len(role) == len(group) == len(held):
        raise ValueError(f"prepare: reach, role, group and held must have one number for each of {len(params)} params")
    of_rule = list(RULES.values())[rule]
    rows, start = [], 0
    for t, mask in enumerate(held):
        slots = [slot for slot in range(mask.bit_length()) if mask >> slot & 1]
        row = dict(zip(slots, state[start : start + len(slots)], strict=True))
        start += len(slots)
        for slot, tensor in row.items():
            if slot < len(of_rule.states) and tensor.shape != params[t].shape:
                raise ValueError(
                    f"prepare: state[{t}] has shape {list(tensor.shape)}, expected {list(params[t].shape)} as its "
                    "parameter; gradients and state must be those of the same parameters, in the same order"
                )
        rows.append(row)
    number = next(_numbers)
    _prepared[number] = _Prepared(of_rule, list(params), rows, list(reach), list(role), list(group))
    return number


def release(prepared: int, like: Tensor) -> None:
    """Forgets what the number stands for."""
    _prepared.pop(prepared, None)


def update_(
    prepared: int,
    grads: Sequence[Tensor],
    coefficients: Tensor,
    skipped: Tensor,
    lrs: Sequence[Tensor],
    lr_of: Sequence[int],
    numbers: Sequence[float],
    measure: bool,
    tickets: Tensor | None,
) -> Tensor:
    """A launch for each reach, dtype, set of states and of flags; with `measure` also for each role, and one more."""
    rows = _prepared[prepared]
    coefficients = _doubles("update_", coefficients, rows.params[0])
    count = len(rows.rule.numbers)
    of_group = [dict(zip(rows.rule.numbers, numbers[g * count :], strict=False)) for g in range(len(lr_of))]
    columns = _columns("update_", grads, rows.reach, rows.params)
    together: dict[tuple[object, ...], list[int]] = {}
    for t, (p, state, g) in enumerate(zip(rows.params, rows.state, rows.group, strict=True)):
        flags = [of_group[g].get(name) for name in update.FLAGS]
        key = (rows.reach[t], p.dtype, *sorted(state), *flags, lr_of[g], rows.role[t] if measure else None)
        together.setdefault(key, []).append(t)
    if tickets is None:  # of the interpreter
        tickets = torch.zeros(TICKETS, dtype=torch.int32, device=coefficients.device)
    grams = coefficients.new_zeros(3, *[coefficients.shape[1]] * 2) if measure else coefficients.new_empty(0)
    with torch.cuda.device_of(rows.params[0]):
        for places in together.values():
            first = places[0]
            distinct = list(dict.fromkeys((rows.group[t], rows.role[t]) for t in places))
            lr = lr_of[rows.group[first]]
            descent = update.Descent(
                params=[rows.params[t] for t in places],
                grads=list(zip(*[columns[t] for t in places], strict=True)),
                groups=tuple(distinct.index((rows.group[t], rows.role[t])) for t in places),
                reach=rows.reach[first],
                table=coefficients,
                skipped=skipped,
                tensor_lr=None if lr < 0 else lrs[lr],
                numbers=tuple(n for g, r in distinct for n in (float(r), *of_group[g].values())),
            )
            states = [[rows.state[t][slot] for t in places] for slot in sorted(rows.state[first])]
            measured = update.step(rows.rule, descent, states, of_group[rows.group[first]], tickets, measure)
            if measured is not None:
                grams += measured
    return grams


def _doubles(op: str, tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.dtype != torch.float64 or tensor.device != like.device:
        raise ValueError(
            f"dtokd_triton::{op}: expected float64 numbers on {like.device}, got {tensor.dtype} on {tensor.device}"
        )
    return tensor.contiguous()


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "gram": gram,
    "min_norm_weights": min_norm_weights,
    "balance": balance,
    "gram_balance": gram_balance,
    "combine_": combine_,
    "prepare": prepare,
    "release": release,
    "update_": update_,
}
_LIBRARY = operations.define("dtokd_triton")
for _name, _function in _FUNCTIONS.items():
    for _key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        _LIBRARY.impl(_name, _function, _key)
