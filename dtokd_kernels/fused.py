"""What backends with fused kernels share: which tensors fit them, what their operations take and return.

Kernels take tensors that fit each other: of one dtype that they know, dense, and with equal strides, as they walk
memory and not indices. An operation that meets others says so (`UNFIT`); gradients are copied then, and parameters
or state go through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .types import Balance, Group, Rescale, Role, Update, Weighting

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Begins the message of an operation whose tensors do not fit, though they are no mistake of the caller.
UNFIT = "dtokd: unfit"

TICKETS = 4  # kTickets in csrc/cuda/launch.h


def register_fakes(namespace: str) -> None:
    """What the operations of a namespace return, for torch.compile and opcheck: shapes without values."""

    @torch.library.register_fake(f"{namespace}::min_norm_weights")
    def min_norm_weights_fake(gram: Tensor, clamp: bool, present: Tensor | None) -> Tensor:
        return gram.new_empty(len(gram), dtype=torch.float64)

    @torch.library.register_fake(f"{namespace}::balance")
    def balance_fake(gram: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        return new_record(gram, len(gram))

    register_writing_fakes(namespace, "combine_")


def register_writing_fakes(namespace: str, *names: str) -> None:
    """The same for operations that return nothing."""
    for name in names:
        torch.library.register_fake(f"{namespace}::{name}", lambda *args, **kwargs: None)


def register_measuring_fakes(namespace: str, *names: str) -> None:
    """The same for updates of parameter groups that return the Gram matrices by role, of a size that `table` has."""
    for name in names:
        schema = getattr(getattr(torch.ops, namespace), name).default._schema
        place = [argument.name for argument in schema.arguments].index("table")

        def fake(*args: Any, place: int = place) -> Tensor:
            table = args[place]
            return table.new_empty(len(Role), table.shape[1], table.shape[1])

        torch.library.register_fake(f"{namespace}::{name}", fake)


def register_gram_fakes(namespace: str) -> None:
    """The same for Gram matrices by role, alone and with their balance."""

    @torch.library.register_fake(f"{namespace}::gram_by_role")
    def gram_fake(
        grads: list[Tensor], counts: list[int], roles: list[int], reaches: list[int], K: int, *args: object
    ) -> Tensor:
        return grads[0].new_empty(len(Role), K, K, dtype=torch.float64)

    @torch.library.register_fake(f"{namespace}::gram_balance")
    def gram_balance_fake(
        grads: list[Tensor], counts: list[int], roles: list[int], reaches: list[int], K: int, *args: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        return grads[0].new_empty(len(Role), K, K, dtype=torch.float64), *new_record(grads[0], K)


def new_record(like: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Room for the two tensors that `record` unpacks."""
    return like.new_empty(values_size(K), dtype=torch.float64), like.new_empty(2, dtype=torch.bool)


def register_gram_step_fakes(namespace: str) -> None:
    """The same for the Gram matrix of one group, and updates that also return it."""

    @torch.library.register_fake(f"{namespace}::gram")
    def gram_fake(grads: list[Tensor], K: int) -> Tensor:
        return grads[0].new_empty(K, K, dtype=torch.float64)

    def products(coefficients: Tensor) -> Tensor:
        return coefficients.new_empty(len(coefficients), len(coefficients))

    # coefficients come after the lists of tensors: five beside the parameters for AdamW, two for SGD
    torch.library.register_fake(f"{namespace}::gram_adamw_step_", lambda *args, **kwargs: products(args[6]))
    torch.library.register_fake(f"{namespace}::gram_sgd_step_", lambda *args, **kwargs: products(args[3]))


def register_solver_fakes(namespace: str) -> None:
    """The same for solvers of weightings: from [K, K] to [K]."""
    for name in ("dual_cone_weights", "cagrad_weights", "nash_weights", "pcgrad_weights"):
        torch.library.register_fake(f"{namespace}::{name}", lambda gram, *args: gram.new_empty(len(gram)))


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


def balance_options(
    weighting: Weighting, max_norm: float | None, rescale: Rescale, loss_floor: float
) -> tuple[bool, bool, bool, float, float]:
    """The options of a balance as the operations take them, of a weighting that is `DTO` or weighed already."""
    logarithmic = getattr(weighting, "log_gradients", True)
    clamp = getattr(weighting, "clamp", True)
    return logarithmic, clamp, rescale == "sum", 0.0 if max_norm is None else max_norm, loss_floor


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


#: What `run_updates` takes: updates, the table of coefficients [3, K], skipped.
Updates = tuple[list[Update], Tensor, Tensor]


def adamw_update(
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    coefficients: Tensor,
    skipped: Tensor,
    *,
    masters: Sequence[Tensor] = (),
    **options: Any,
) -> Updates:
    """The arguments of `reference.adamw_step` as a backend's `run_updates` takes them."""
    state = {
        "exp_avgs": list(exp_avgs),
        "exp_avg_sqs": list(exp_avg_sqs),
        "max_exp_avg_sqs": list(max_exp_avg_sqs),
        "state_steps": list(state_steps),
        "masters": list(masters),
    }
    return _one_update("adamw_step", params, grads, state, coefficients, skipped, options)


def sgd_update(
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    momentum_buffers: Sequence[Tensor],
    coefficients: Tensor,
    skipped: Tensor,
    *,
    masters: Sequence[Tensor] = (),
    **options: Any,
) -> Updates:
    """The arguments of `reference.sgd_step`, the same way."""
    state = {"momentum_buffers": list(momentum_buffers), "masters": list(masters)}
    return _one_update("sgd_step", params, grads, state, coefficients, skipped, options)


def _one_update(
    rule: Any,
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    state: dict[str, list[Tensor]],
    coefficients: Tensor,
    skipped: Tensor,
    options: dict[str, Any],
) -> Updates:
    lists = [list(row) for row in grads]
    update = Update(rule, Role.SHARED, tuple(range(len(grads))), list(params), lists, state, options)
    return [update], coefficients.expand(len(Role), -1), skipped


def unfit_updates(updates: list[Update], run: Callable[[list[Update]], object]) -> list[Update]:
    """run(updates), or, if some tensor fits no kernel, run([update]) for each; those that do not fit even so."""
    try:
        run(updates)
    except RuntimeError as error:
        if not is_unfit(error):
            raise
        return updates if len(updates) == 1 else [u for update in updates for u in unfit_updates([update], run)]
    return []


def has_betas_on_device(updates: Sequence[Update]) -> bool:
    """Whether a beta is a tensor on a GPU: only the device knows its value, so it takes the reference."""
    betas = [update.options.get(name) for update in updates for name in ("beta1", "beta2")]
    return any(isinstance(beta, Tensor) and beta.is_cuda for beta in betas)


def run_fitting(
    run: Callable[[list[Tensor]], None], grads: Sequence[Sequence[Tensor]], written: Sequence[Sequence[Tensor]]
) -> bool:
    """Run a kernel that writes to `written`; False, with nothing changed, if those tensors do not fit it.

    The operation itself checks whether all tensors fit, as that costs least there; gradients that do not are copied.
    """
    try:
        run(flat(grads))
    except RuntimeError as error:
        if not is_unfit(error):
            raise
        try:
            run(flat(laid_out(grads, written[0])))
        except RuntimeError as again:
            if not is_unfit(again):
                raise
            return False
    for tensors in written:
        increment_version(tensors)
    return True


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
