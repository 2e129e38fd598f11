"""What backends with fused kernels share: which tensors fit them, what their operations take and return.

Kernels take tensors that fit each other: of one dtype that they know, dense, and with equal strides, as they walk
memory and not indices. An operation that meets others says so (`UNFIT`); gradients are copied then, and parameters
or state go through the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import reference
from .types import Balance, Group, Options, Role, Update

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Begins the message of an operation whose tensors do not fit, though they are no mistake of the caller.
UNFIT = "dtokd: unfit"

TICKETS = 4  # kTickets in csrc/cuda/launch.h


def values_size(K: int) -> int:
    """How many numbers an operation `balance` returns for K objectives."""
    return 5 * K + K * K + 1


def record(gram: Tensor, values: Tensor, flags: Tensor) -> Balance:
    """The `Balance` that an operation `balance` returned as two tensors: views of them, nothing is copied."""
    K = len(gram)
    weights, table, norms, cosine, norm = values.split([K, 3 * K, K, K * K, 1])
    return Balance(
        weights=weights,
        table=table.view(3, K),
        gram=gram,
        cosine=cosine.view(K, K),
        norms=norms,
        norm=norm[0],
        vertex=flags[0],
        skipped=flags[1],
    )


_tickets: dict[tuple[int, int], Tensor] = {}


def tickets(device: torch.device) -> Tensor:
    """Zeros that the launches of one stream share: each leaves them zero, so nothing sets them again.

    A captured graph gets its own, as it may be replayed on any stream.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(TICKETS, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    key = (stream.device_index, stream.cuda_stream)
    if key not in _tickets:
        _tickets[key] = torch.zeros(TICKETS, dtype=torch.int32, device=device)
    return _tickets[key]


def balance_options(options: Options) -> tuple[bool, bool, bool, float, float, float]:
    """The options of a balance as the operations take them, of a weighting that is `DTO` or weighed already."""
    clamp = getattr(options.weighting, "clamp", True)
    max_norm = 0.0 if options.max_norm is None else options.max_norm
    return options.log_gradients, clamp, options.rescale == "sum", max_norm, options.loss_floor, options.limit


class Groups:
    """Gradients of several groups as the operations take them: one flat list, and numbers that say how it is cut."""

    def __init__(self, members: Sequence[tuple[Role, tuple[int, ...], list[list[Tensor]]]]) -> None:
        self._lists = [lists for _, _, lists in members]
        self._shape = (
            [len(lists[0]) for lists in self._lists],
            [int(role) for role, _, _ in members],
            [sum(1 << i for i in reach) for _, reach, _ in members],
        )
        self.device = self._lists[0][0][0].device

    @classmethod
    def by_role(cls, groups: Mapping[Role, Sequence[Group]]) -> Groups:
        """Groups of gradients, role by role."""
        return cls([(role, *group) for role, same_role in sorted(groups.items()) for group in same_role])

    def run(self, operation: Any, like: Sequence[Tensor] | None = None) -> Any:
        """operation(grads, counts, roles, reaches); gradients that are not laid out as `like`, or dense, are copied."""
        try:
            return operation([g for lists in self._lists for g in flat(lists)], *self._shape)
        except RuntimeError as error:
            if not is_unfit(error):
                raise
        grads: list[Tensor] = []
        start = 0
        for lists in self._lists:
            count = len(lists[0])
            layout = dense(lists[0]) if like is None else like[start : start + count]
            grads += flat(laid_out(lists, layout))
            start += count
        return operation(grads, *self._shape)


#: The operations of each rule for several parameter groups.
OPERATIONS = {"adamw_step": "adamw_updates_", "sgd_step": "sgd_updates_"}


def run_updates(
    parts: Iterable[list[Update]], run: Callable[[list[Update]], object], table: Tensor, skipped: Tensor
) -> None:
    """run(part) for updates that share a call of an operation; those that fit none go through the reference."""
    unfit = [update for part in parts for update in _unfit(part, run)]
    reference.run_updates(unfit, table, skipped)


def measure_and_update(
    parts: Iterable[list[Update]], run: Callable[[list[Update]], Tensor], table: Tensor, skipped: Tensor
) -> Tensor:
    """The same with an operation that returns the Gram matrices [3, K, K]; their sum over all updates."""
    grams: list[Tensor] = []
    unfit = [update for part in parts for update in _unfit(part, lambda some: grams.append(run(some)))]
    if unfit or not grams:
        grams.append(reference.measure_and_update(unfit, table, skipped))
    return functools.reduce(Tensor.add, grams)


def _unfit(updates: list[Update], run: Callable[[list[Update]], object]) -> list[Update]:
    """run(updates), or, if some tensor fits no kernel, run([update]) for each; those that do not fit even so."""
    try:
        run(updates)
    except RuntimeError as error:
        if not is_unfit(error):
            raise
        return updates if len(updates) == 1 else [u for update in updates for u in _unfit([update], run)]
    return []


def has_betas_on_device(updates: Sequence[Update]) -> bool:
    """Whether a beta is a tensor on a GPU: only the device knows its value, so it takes the reference."""
    betas = [update.options.get(name) for update in updates for name in ("beta1", "beta2")]
    return any(isinstance(beta, Tensor) and beta.is_cuda for beta in betas)


def run_fitting(
    run: Callable[[list[Tensor]], Any], grads: Sequence[Sequence[Tensor]], written: Sequence[Sequence[Tensor]]
) -> Any:
    """Run an operation that writes to `written`; what it returns.

    It checks by itself whether all tensors fit, as that costs least there; gradients that do not are copied.

    Raises:
        RuntimeError: `UNFIT`, with nothing changed: those that it writes to do not.
    """
    try:
        result = run(flat(grads))
    except RuntimeError as error:
        if not is_unfit(error):
            raise
        result = run(flat(laid_out(grads, written[0])))
    for tensors in written:
        increment_version(tensors)
    return result


def combine(
    operation: Any, grads: Sequence[Sequence[Tensor]], coefficients: Tensor, out: Sequence[Tensor] | None
) -> list[Tensor]:
    """`reference.combine` by operation(out, flat grads, coefficients)."""
    targets = [torch.empty_like(g) for g in grads[0]] if out is None else list(out)
    try:
        run_fitting(lambda flat: operation(targets, flat, coefficients), grads, [targets])
    except RuntimeError as error:
        if not is_unfit(error):
            raise
        return reference.combine(grads, coefficients, targets)
    return targets


def is_unfit(error: RuntimeError) -> bool:
    """Whether an operation refused its tensors because they do not fit its kernels."""
    return UNFIT in str(error)


def flat(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The lists one after the other, as the operations take them."""
    return [t for values in lists for t in values]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in whatever order."""
    return torch.ops.aten.is_non_overlapping_and_dense.default(tensor)


def dense(grads: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, copied where they have gaps or overlaps: a layout that all can be brought to."""
    return [g if is_dense(g) else g.contiguous() for g in grads]


def laid_out(grads: Sequence[Sequence[Tensor]], like: Sequence[Tensor]) -> list[list[Tensor]]:
    """The gradients, copied where their memory is not laid out as that of `like`."""
    return [
        [
            g if g.stride() == t.stride() and is_dense(g) else torch.empty_like(t, dtype=g.dtype).copy_(g)
            for g, t in zip(row, like, strict=True)
        ]
        for row in grads
    ]
