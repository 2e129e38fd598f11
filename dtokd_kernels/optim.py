"""DTOAdamW and DTOSGD: torch's AdamW and SGD on a balanced direction.

    optimizer.backward({"task": task_loss, "distill": distill_loss})   # K gradient sets
    optimizer.step()                                                   # Gram -> weights -> update
    optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import backends
from .checks import check_options, check_params
from .gradients import GradientSets, Losses
from .ops import Group, gram_of_groups, of_reach
from .types import Balance, Private, Rescale, Weighting

SHARED, PRIVATE, PLAIN = range(3)


@dataclass(frozen=True)
class _Options:
    """What an optimizer does besides its update rule."""

    weighting: Weighting
    max_norm: float | None
    rescale: Rescale
    private: Private
    loss_floor: float
    backend: str | None


@dataclass
class _Bucket:
    """Parameters that one kernel call can update: of one group, role, reach, dtype and device."""

    group: dict[str, Any]
    role: int
    reach: tuple[int, ...]
    params: list[Tensor]
    lists: list[list[Tensor]]

    @property
    def gradients(self) -> Group:
        return self.reach, self.lists


class _Balanced(torch.optim.Optimizer):
    """What the balanced optimizers share: gradient sets in, coefficients out. A subclass adds the update."""

    _options: _Options

    def _set_options(
        self,
        weighting: Weighting | None,
        max_norm: float | None,
        rescale: Rescale,
        private: Private,
        loss_floor: float,
        backend: str | None,
    ) -> None:
        op = type(self).__name__
        weighting = check_options(op, weighting, max_norm, rescale, loss_floor, private)
        if backend is not None:
            backends.check_name(backend, f"{op}: backend")
        self._options = _Options(weighting, max_norm, rescale, private, loss_floor, backend)
        self._forget()

    def _forget(self) -> None:
        self._sets = GradientSets()
        self._balance: Balance | None = None
        self._skipped_steps: Tensor | None = None

    @property
    def balance(self) -> Balance | None:
        """The last step's `Balance`; None before the first step. Reading a CUDA tensor of it stalls, keeping it
        does not."""
        return self._balance

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives that the gradients gathered now belong to, in their order."""
        return self._sets.names

    @property
    def skipped_steps(self) -> Tensor:
        """Scalar int64 on the gradients' device: steps that changed nothing, since the optimizer was made."""
        return torch.zeros((), dtype=torch.int64) if self._skipped_steps is None else self._skipped_steps

    def backward(
        self, losses: Losses, *, retain_graph: bool = False, inputs: Sequence[Tensor] | None = None
    ) -> None:
        """Run one backward pass per loss and add its gradients to that objective's set.

        Call it several times between steps to accumulate. `.grad` of the parameters stays as it was.

        Args:
            losses: K scalar tensors, as a sequence or as a dict from names; one tensor is one objective.
            retain_graph: keep the graph after the last pass; it is always freed otherwise.
            inputs: restrict the passes to these leaves.

        Raises:
            TypeError, ValueError: a bad loss: not scalar, not finite, needs no gradient, not positive under a
                logarithm; other objectives than before; a sparse gradient. Parameters and state are as before.
        """
        self._sets.collect(
            losses,
            [p for group in self.param_groups for p in group["params"] if p.requires_grad],
            positive=getattr(self._options.weighting, "log_gradients", True),
            retain_graph=retain_graph,
            inputs=inputs,
            op=f"{type(self).__name__}.backward",
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Balance the gradients that `backward` gathered and update the parameters.

        Args:
            closure: evaluates the model again: calls zero_grad() and backward(losses), returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: `backward` was not called since the last zero_grad().

        Effects: no host sync on CUDA. If a gradient or loss is not finite, nothing changes and the step counts in
            `skipped_steps`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._sets.losses is None:
            raise RuntimeError(
                f"{type(self).__name__}.step: there are no gradients; call backward(losses) of this optimizer first "
                "(not loss.backward())"
            )
        buckets = self._buckets()
        record = self._balance = self._solve(buckets)
        skipped = record.skipped
        count = skipped.long()
        self._skipped_steps = count if self._skipped_steps is None else self._skipped_steps + count
        if skipped.device.type == "cpu" and skipped:
            return loss
        tables = (record.coefficients, record.private_coefficients, record.plain_coefficients)
        # newest gradients first: those that the Gram pass read last are still in cache
        for bucket in reversed(buckets):
            coefficients = of_reach(tables[bucket.role], bucket.reach)
            self._update(bucket, coefficients, skipped)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradient sets, and clear `.grad` as torch does.

        Args:
            set_to_none: False keeps the memory of the sets and fills it with zeros.
        """
        super().zero_grad(set_to_none)
        if set_to_none:
            self._sets.clear()
        else:
            self._sets.zero()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; `balance=False` in it keeps its parameters out of the balance (see the class).

        Raises:
            ValueError: a complex parameter, besides what torch refuses.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group["params"]:
                check_params(type(self).__name__, group["params"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group.setdefault("balance", True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_sets" not in self.__dict__:  # a copy or an unpickled optimizer
            self._forget()
        for group in self.param_groups:
            group.setdefault("balance", True)

    def _buckets(self) -> list[_Bucket]:
        rows = self._sets.rows
        K = len(self._sets.names)
        everyone = tuple(range(K))
        own = self._options.private == "own"
        buckets: dict[Any, _Bucket] = {}
        for index, group in enumerate(self.param_groups):
            role_of_full = SHARED if group["balance"] else PLAIN
            role_of_part = role_of_full if not (own and group["balance"]) else PRIVATE
            for p in group["params"]:
                row = rows.get(p)
                if row is None:
                    continue
                if None.__class__ in map(type, row):
                    reach = tuple([i for i, g in enumerate(row) if g is not None])
                    if not reach:
                        continue
                    role = role_of_part
                else:
                    reach, role = everyone, role_of_full
                key = (index, role, reach, p.dtype, p.device)
                bucket = buckets.get(key)
                if bucket is None:
                    bucket = buckets[key] = _Bucket(group, role, reach, [], [[] for _ in reach])
                bucket.params.append(p)
                for values, i in zip(bucket.lists, reach, strict=True):
                    values.append(row[i])  # type: ignore[arg-type]
        return list(buckets.values())

    def _solve(self, buckets: list[_Bucket]) -> Balance:
        options = self._options
        losses = self._sets.losses
        assert losses is not None
        K = len(losses)
        grams: list[Tensor | None] = [None] * 3
        for role in (SHARED, PRIVATE, PLAIN):
            members = _merged([b for b in buckets if b.role == role])
            if members:
                grams[role] = gram_of_groups(members, K, options.backend)
        shared = grams[SHARED]
        if shared is None:
            device = buckets[0].params[0].device if buckets else losses.device
            shared = torch.zeros(K, K, dtype=torch.float64, device=device)
        return backends.select(shared.device, options.backend).balance(
            shared,
            losses,
            options.weighting,
            max_norm=options.max_norm,
            rescale=options.rescale,
            loss_floor=options.loss_floor,
            private_gram=grams[PRIVATE],
            plain_gram=grams[PLAIN],
        )

    def _update(self, bucket: _Bucket, coefficients: Tensor, skipped: Tensor) -> None:
        raise NotImplementedError


def _merged(buckets: Iterable[_Bucket]) -> list[Group]:
    """Groups of gradients over all parameter groups, so that the Gram takes as few calls as it can."""
    groups: dict[Any, Group] = {}
    for bucket in buckets:
        first = bucket.params[0]
        key = (bucket.reach, first.dtype, first.device)
        if key not in groups:
            groups[key] = (bucket.reach, [list(values) for values in bucket.lists])
        else:
            for values, more in zip(groups[key][1], bucket.lists, strict=True):
                values.extend(more)
    return list(groups.values())


_SHARED_ARGS = """weighting: how the Gram matrix becomes weights; default `weighting.DTO()`.
        max_norm: clip the combined direction to this norm; costs no pass, as the norm comes from the Gram matrix.
        rescale: "none" multiplies gradients by pi_i / L_i (the paper); "sum" divides these by their sum, so that
            learning rates tuned for a weighted sum of the losses keep their meaning.
        private: "own": parameters that only some objectives reach (a head, a projector) stay out of the Gram and
            take those objectives' gradients at weight 1 (1 / L_i with rescale "none"); "balanced": all in the Gram.
        loss_floor: smallest loss divided by.
        backend: "cuda", "triton", "cpu" or "reference"; default: the best for the parameters' device.

    A parameter group takes `balance=False`: its gradient is the sum of the objectives' gradients."""


class DTOAdamW(_Balanced, torch.optim.AdamW):
    __doc__ = f"""AdamW on DTO-KD's balanced direction; a drop-in for `torch.optim.AdamW` with K losses.

    Source: DTO-KD (ICLR 2026), Eq. 8-12; AdamW (ICLR 2019).

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as in `torch.optim.AdamW`. `maximize` turns the
            combined direction around.
        {_SHARED_ARGS}

    State names are torch's, so `state_dict` loads into `torch.optim.AdamW` and back.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> student = torch.nn.Linear(4, 2)
        >>> optimizer = dk.DTOAdamW(student.parameters(), lr=1e-3, max_norm=1.0)
        >>> out = student(torch.ones(3, 4))
        >>> optimizer.backward({{"task": out.square().mean(), "distill": (out - 1).square().mean()}})
        >>> optimizer.step()
        >>> optimizer.zero_grad()
        >>> bool((optimizer.balance.weights >= 0).all())
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        weighting: Weighting | None = None,
        max_norm: float | None = None,
        rescale: Rescale = "none",
        private: Private = "own",
        loss_floor: float = 1e-8,
        backend: str | None = None,
    ) -> None:
        self._set_options(weighting, max_norm, rescale, private, loss_floor, backend)
        torch.optim.AdamW.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, capturable=capturable
        )

    def _update(self, bucket: _Bucket, coefficients: Tensor, skipped: Tensor) -> None:
        group, device = bucket.group, bucket.params[0].device
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps = [], [], [], []
        for p in bucket.params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(
                    (), dtype=torch.float32, device=p.device if group["capturable"] else "cpu"
                )
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if group["amsgrad"] and "max_exp_avg_sq" not in state:
                state["max_exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            state_steps.append(state["step"])
            if group["amsgrad"]:
                max_exp_avg_sqs.append(state["max_exp_avg_sq"])
        beta1, beta2 = group["betas"]
        backends.select(device, self._options.backend).adamw_step(
            bucket.params,
            bucket.lists,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            state_steps,
            coefficients,
            skipped,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )


class DTOSGD(_Balanced, torch.optim.SGD):
    __doc__ = f"""SGD on DTO-KD's balanced direction; a drop-in for `torch.optim.SGD` with K losses.

    Source: DTO-KD (ICLR 2026), Eq. 8-12.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`. `maximize` turns the
            combined direction around.
        {_SHARED_ARGS}

    `rescale` is "sum" by default: SGD feels the factor 1 / L_i as a learning rate.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> student = torch.nn.Linear(4, 2)
        >>> optimizer = dk.DTOSGD(student.parameters(), lr=0.1, momentum=0.9)
        >>> out = student(torch.ones(3, 4))
        >>> optimizer.backward([out.square().mean(), (out - 1).square().mean()])
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        weighting: Weighting | None = None,
        max_norm: float | None = None,
        rescale: Rescale = "sum",
        private: Private = "own",
        loss_floor: float = 1e-8,
        backend: str | None = None,
    ) -> None:
        self._set_options(weighting, max_norm, rescale, private, loss_floor, backend)
        torch.optim.SGD.__init__(
            self, params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize
        )

    def _update(self, bucket: _Bucket, coefficients: Tensor, skipped: Tensor) -> None:
        group, device = bucket.group, bucket.params[0].device
        momentum = group["momentum"]
        implementation = backends.select(device, self._options.backend)
        fresh = [momentum != 0 and self.state[p].get("momentum_buffer") is None for p in bucket.params]
        for first in sorted(set(fresh)):
            chosen = [i for i, f in enumerate(fresh) if f is first]
            params = [bucket.params[i] for i in chosen]
            buffers = []
            if momentum != 0:
                for p in params:
                    state = self.state[p]
                    if first:
                        state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    buffers.append(state["momentum_buffer"])
            implementation.sgd_step(
                params,
                [[values[i] for i in chosen] for values in bucket.lists],
                buffers,
                coefficients,
                skipped,
                lr=group["lr"],
                momentum=momentum,
                dampening=group["dampening"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                first=first,
            )
