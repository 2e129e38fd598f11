"""What computes a step: the reference, or kernels, called as torch operations. Both have the same methods."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import reference
from .rows import DTYPES, GradientRows, Rows, objectives
from .rules import RULES, Rule
from .types import Balance, Options, Role
from .weighting import DTO

TICKETS = 4  # kTickets in csrc/cuda/launch.h
RESIDENT_PARAMETERS = 4096 * 4096  # kMaxWholeChunks tiles in csrc/cuda/plan.h: no larger model fits `resident`

#: Numbers of rows that are gone, each with the operation that releases it and a tensor of its device. Released when the
#: next rows are prepared: a finalizer may run at any time, also where torch runs no operation.
_gone: list[tuple[Any, int, Tensor]] = []

#: The hyper-parameters of a group, by the rule's names.
Numbers = Mapping[str, Any]


class Implementation:
    """What a backend can do; here by the formulas in torch, on any device, and in `Kernels` by fewer launches.

    Tensors are on one device; nothing waits for it.
    """

    name = "reference"
    #: whether `resident` is worth asking
    steps_at_once = False

    def gram(self, rows: GradientRows, K: int) -> Tensor:
        """[3, K, K] float64: the Gram matrix of each role."""
        grams = torch.zeros(len(Role), K, K, dtype=torch.float64, device=rows.grads[0].device)
        for role in sorted(set(rows.layout.role)):
            grams[role] = reference.gram(list(zip(*_columns(rows, K, role), strict=True)))
        return grams

    def min_norm_weights(self, gram: Tensor, clamp: bool = True, present: Tensor | None = None) -> Tensor:
        """[K] float64 from [K, K]; see `reference.min_norm_weights`."""
        return reference.min_norm_weights(gram, clamp, present)

    def balance(self, grams: Tensor, losses: Tensor, options: Options, weights: Tensor | None = None) -> Balance:
        """From Gram matrices [3, K, K] to coefficients; see `reference.balance`."""
        return reference.balance(grams, losses, options, weights)

    def balance_before(
        self, grams: Tensor, losses_before: Tensor, losses: Tensor, squares: Tensor, roles: int, options: Options
    ) -> Balance:
        """The balance as an earlier step's Gram matrices give it; see `reference.balance_before`."""
        return reference.balance_before(grams, losses_before, losses, squares, roles, options)

    def gram_balance(self, rows: GradientRows, losses: Tensor, options: Options) -> Balance:
        """`gram` and `balance`."""
        return self.balance(self.gram(rows, len(losses)), losses, options)

    def combine(self, out: Sequence[Tensor], rows: GradientRows, coefficients: Tensor) -> None:
        """Store sum_i c_i g_i of each row, with coefficients [3, K] float64 by role; `out` may be a row's gradients."""
        columns = zip(out, _columns(rows, coefficients.shape[1]), rows.layout.role, strict=True)
        for target, column, role in columns:
            reference.combine([[g] for g in column], coefficients[role], [target])

    def lacks(self, rule: Rule, p: Tensor, state: Mapping[str, Tensor], numbers: Numbers) -> str | None:
        """What keeps it from updating a parameter, as in "has no kernel for ..."; None if nothing does."""
        return None

    def update(
        self,
        rows: Rows,
        grads: GradientRows,
        numbers: Sequence[Numbers],
        coefficients: Tensor,
        skipped: Tensor,
        measure: bool = False,
    ) -> Tensor | None:
        """Update parameters and state in place, unless `skipped` (scalar bool).

        Args:
            rows: what is updated.
            grads: its gradients.
            numbers: the hyper-parameters of each group.
            coefficients: [3, K] float64, by role.
            skipped: scalar bool: change nothing.
            measure: also return the Gram matrices [3, K, K] of the gradients, from the same pass over them.
        """
        K = coefficients.shape[1]
        grams = self.gram(grads, K) if measure else None
        for t, column in enumerate(_columns(grads, K)):
            of_role, of_group = coefficients[grads.layout.role[t]], numbers[rows.group[t]]
            reference.update(rows.rule.name, rows.params[t], column, rows.state[t], of_role, skipped, of_group)
        return grams

    def resident(
        self, rows: Rows, grads: GradientRows, numbers: Sequence[Numbers], losses: Tensor, options: Options
    ) -> Balance | None:
        """`gram_balance` and `update` in one launch; None, with nothing changed, where there is no such launch."""
        return None


def solves(options: Options) -> bool:
    """Whether kernels solve for the weights: those of DTO-KD. Others are computed by the weighting, in torch."""
    return type(options.weighting) is DTO


def _columns(rows: GradientRows, K: int, role: int | None = None) -> list[list[Tensor | None]]:
    """A column of K gradients or None for each row, or for those of one role."""
    columns = []
    for reach, of_row, column in zip(rows.layout.reach, rows.layout.role, rows.columns(), strict=True):
        if role in (None, of_row):
            there = dict(zip(objectives(reach), column, strict=True))
            columns.append([there.get(i) for i in range(K)])
    return columns


class Kernels(Implementation):
    """The operations of a namespace.

    Args:
        name: of the backend.
        namespace: of its operations.
        mixed: whether there are kernels with master copies, and with state of another dtype than the parameter's.
        resident: whether there is an operation `resident_`.
        device_lr: whether a learning rate may be a tensor on a GPU.
    """

    def __init__(
        self, name: str, namespace: str, *, mixed: bool = False, resident: bool = False, device_lr: bool = False
    ) -> None:
        self.name, self.namespace, self.steps_at_once = name, namespace, resident
        self._mixed, self._device_lr = mixed, device_lr

    @property
    def _ops(self) -> Any:
        return getattr(torch.ops, self.namespace)

    def gram(self, rows: GradientRows, K: int) -> Tensor:
        """See `Implementation`."""
        layout = rows.layout
        return _launched(self._ops.gram.default, layout.device, rows.grads, layout.reach, layout.role, K)

    def min_norm_weights(self, gram: Tensor, clamp: bool = True, present: Tensor | None = None) -> Tensor:
        """See `Implementation`."""
        return self._ops.min_norm_weights.default(gram.double().contiguous(), clamp, present)

    def balance(self, grams: Tensor, losses: Tensor, options: Options, weights: Tensor | None = None) -> Balance:
        """See `Implementation`."""
        grams = grams.double().contiguous()
        losses = losses.to(grams.device, torch.float64).contiguous()
        if weights is None and not solves(options):
            weights = reference.weigh(grams[Role.SHARED], losses, options).contiguous()
        values, flags = self._ops.balance.default(grams, losses, weights, None, None, 0, *_options(options))
        return _record(grams, values, flags)

    def balance_before(
        self, grams: Tensor, losses_before: Tensor, losses: Tensor, squares: Tensor, roles: int, options: Options
    ) -> Balance:
        """See `Implementation`; one launch with DTO-KD's weights."""
        weights = None
        if not solves(options):
            grams = reference.of_present(grams, squares)
            weights = reference.weigh(grams[Role.SHARED], losses_before, options).contiguous()
        values, flags = self._ops.balance.default(
            grams, losses, weights, losses_before, squares, roles, *_options(options)
        )
        return _record(grams, values, flags)

    def gram_balance(self, rows: GradientRows, losses: Tensor, options: Options) -> Balance:
        """See `Implementation`."""
        if not solves(options):
            return super().gram_balance(rows, losses, options)
        layout = rows.layout
        losses = losses.to(layout.device, torch.float64).contiguous()
        arguments = (rows.grads, layout.reach, layout.role, losses, *_options(options))
        return _record(*_launched(self._ops.gram_balance.default, layout.device, *arguments))

    def combine(self, out: Sequence[Tensor], rows: GradientRows, coefficients: Tensor) -> None:
        """See `Implementation`."""
        targets = [target if is_dense(target) else torch.empty(target.shape).to(target) for target in out]
        coefficients = coefficients.to(out[0].device, torch.float64).contiguous()
        self._ops.combine_.default(targets, rows.grads, rows.layout.reach, rows.layout.role, coefficients)
        increment_version(targets)
        for target, made in zip(out, targets, strict=True):
            if made is not target:
                target.copy_(made)

    def lacks(self, rule: Rule, p: Tensor, state: Mapping[str, Tensor], numbers: Numbers) -> str | None:
        """See `Implementation`."""
        if p.dtype not in DTYPES:
            return f"parameters of {p.dtype}"
        if not is_dense(p):
            return "parameters with gaps in memory"
        if any(isinstance(v, Tensor) and v.is_cuda for name, v in numbers.items() if name != "lr"):
            return "a beta that is a tensor on the GPU"
        for name, tensor in state.items():
            if name != "step" and not p.is_contiguous() * tensor.is_contiguous() and tensor.stride() != p.stride():
                return "state that is laid out otherwise than its parameter"
        if "step" in state and state["step"].dtype is not torch.float32:
            return f"counters of steps of {state['step'].dtype}"
        if "master" in state and not self._mixed:
            return "master copies of parameters (master_weights=True)"
        dtypes = {tensor.dtype for name, tensor in state.items() if name in rule.states}
        half = p.dtype in (torch.float16, torch.bfloat16)
        others = {torch.float32} if half else {torch.bfloat16} if p.dtype is torch.float32 else set()
        if len(dtypes) > 1 or not dtypes <= ({p.dtype, *others} if self._mixed else {p.dtype}):
            return f"state of {' and '.join(sorted(map(str, dtypes)))} beside parameters of {p.dtype}"
        return None

    def update(
        self,
        rows: Rows,
        grads: GradientRows,
        numbers: Sequence[Numbers],
        coefficients: Tensor,
        skipped: Tensor,
        measure: bool = False,
    ) -> Tensor | None:
        """See `Implementation`."""
        device = rows.params[0].device
        coefficients = coefficients.to(torch.float64).contiguous()
        numbers_of = self._numbers(rows.rule, numbers, device)
        arguments = (self._prepared(rows), grads.grads, coefficients, skipped, *numbers_of, measure)
        grams = _launched(self._ops.update_.default, device, *arguments)
        increment_version(rows.written)
        return grams if measure else None

    def resident(
        self, rows: Rows, grads: GradientRows, numbers: Sequence[Numbers], losses: Tensor, options: Options
    ) -> Balance | None:
        """For AdamW without amsgrad and master copies, DTO-KD's weights, K <= 2, and as much as a chip can hold."""
        if not (self.steps_at_once and solves(options) and len(losses) <= 2):
            return None
        if "fits" not in rows.prepared:
            small = sum(p.numel() for p in rows.params) <= RESIDENT_PARAMETERS
            plain = not any(state.keys() & {"max_exp_avg_sq", "master"} for state in rows.state)
            rows.prepared["fits"] = small and plain and rows.rule is RULES["adamw"]
        if not rows.prepared["fits"]:
            return None
        device = rows.params[0].device
        losses = losses.to(device, torch.float64).contiguous()
        numbers_of = self._numbers(rows.rule, numbers, device)
        arguments = (self._prepared(rows), grads.grads, losses, *_options(options), *numbers_of)
        grams, values, flags = _launched(self._ops.resident_.default, device, *arguments)
        if grams.numel() == 0:
            rows.prepared["fits"] = False  # on this device
            return None
        increment_version(rows.written)
        return _record(grams, values, flags)

    def _prepared(self, rows: Rows) -> int:
        """The number that stands for the rows in the operations."""
        number = rows.prepared.get(self.namespace)
        if number is None:
            while _gone:
                release, *arguments = _gone.pop()
                release(*arguments)
            slots = rows.rule.slots
            held = [[(slots[name], tensor) for name, tensor in state.items()] for state in rows.state]
            for row in held:
                row.sort(key=lambda pair: pair[0])
            state = [tensor for row in held for _, tensor in row]
            masks = [sum(1 << slot for slot, _ in row) for row in held]
            layout = rows.layout
            number = self._ops.prepare.default(
                rows.rule.index, rows.params, state, layout.reach, layout.role, rows.group, masks
            )
            rows.prepared[self.namespace] = number
            like = rows.params[0].new_empty(0)
            weakref.finalize(rows, _gone.append, (self._ops.release.default, number, like)).atexit = False
        assert isinstance(number, int)
        return number

    def _numbers(
        self, rule: Rule, numbers: Sequence[Numbers], device: torch.device
    ) -> tuple[list[Tensor], list[int], list[float]]:
        """The hyper-parameters as the operations take them: learning rates on the device, their indices, all others."""
        lrs: list[Tensor] = []
        lr_of, flat = [], []
        for group in numbers:
            lr = group["lr"]
            on_device = self._device_lr and isinstance(lr, Tensor) and lr.device == device
            if on_device and lr.dtype in (torch.float32, torch.float64):
                lr_of.append(len(lrs))
                lrs.append(lr)
                flat.append(0.0)
            else:
                lr_of.append(-1)
                flat.append(float(lr))
            flat += [float(group[name]) for name in rule.numbers[1:]]
        return lrs, lr_of, flat


def _options(options: Options) -> tuple[bool, bool, bool, float, float, float]:
    """The options of a balance as the operations take them, of a weighting that is `DTO` or weighed already."""
    clamp = getattr(options.weighting, "clamp", True)
    max_norm = 0.0 if options.max_norm is None else options.max_norm
    return options.log_gradients, clamp, options.rescale == "sum", max_norm, options.loss_floor, options.limit


def _record(grams: Tensor, values: Tensor, flags: Tensor) -> Balance:
    """The `Balance` that an operation has returned: views of its tensors, nothing is copied."""
    K = grams.shape[1]
    weights, table, norms, cosine, norm = torch.split_with_sizes(values, [K, 3 * K, K, K * K, 1])
    return Balance(
        weights=weights,
        table=table.view(3, K),
        gram=grams[Role.SHARED],
        cosine=cosine.view(K, K),
        norms=norms,
        norm=norm[0],
        vertex=flags[0],
        skipped=flags[1],
    )


_tickets: dict[tuple[int, int], Tensor] = {}


def tickets(device: torch.device | None) -> Tensor | None:
    """Zeros that the launches of one stream share: each leaves them zero, so nothing sets them again.

    A captured graph gets its own, as it may be replayed on any stream.
    """
    if device is None or device.type != "cuda":
        return None
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(TICKETS, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    key = (stream.device_index, stream.cuda_stream)
    if key not in _tickets:
        _tickets[key] = torch.zeros(TICKETS, dtype=torch.int32, device=device)
    return _tickets[key]


#: One operation at a time: threads that use one stream share its tickets, and these count over an operation's launches.
_one_operation = threading.Lock()


def _launched(operation: Callable[..., Any], device: torch.device | None, *arguments: object) -> Any:
    """What an operation returns that takes tickets.

    Where one of several launches fails, those before it may have been counted: the next operation of the stream gets
    new tickets, as it would take another block for its last, and its weights would be wrong. On a CPU there are no
    tickets, and steps of several threads do not wait for one another.
    """
    with _one_operation:
        if (held := tickets(device)) is not None:
            try:
                return operation(*arguments, held)
            except BaseException:
                for key in [key for key, value in _tickets.items() if value is held]:
                    del _tickets[key]
                raise
    return operation(*arguments, None)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in whatever order."""
    return torch.ops.aten.is_non_overlapping_and_dense.default(tensor)
