"""DTOAdamW and DTOSGD: torch's AdamW and SGD on a balanced direction.

optimizer.backward({"task": task_loss, "distill": distill_loss})   # K gradient sets
optimizer.step()                                                   # Gram -> weights -> update
optimizer.zero_grad()
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .checks import check_flag, check_options, check_params
from .gradients import GradientSets, Losses
from .ops import run_step, run_updates, runs_steps
from .ranks import Ranks
from .solve import commit, solve_sets
from .sources import Exact, Source, choose
from .trial import needs_trial
from .types import Balance, Group, Options, Private, Rescale, Role, Update, Weighting, limit_of
from .weighting import Stateful


@dataclass
class _Bucket:
    """Parameters that one kernel call can update: of one group, role, reach, dtype and device."""

    group: dict[str, Any]
    role: Role
    reach: tuple[int, ...]
    params: list[Tensor]
    positions: list[int]  # of the parameters, counted over all groups

    def gradients(self, grads: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor]]:
        """The bucket's lists of gradients, one per objective that reaches it."""
        return [[grads[i][t] for t in self.positions] for i in self.reach]  # type: ignore[misc]


class Balanced(torch.optim.Optimizer):
    """What the balanced optimizers share: gradient sets in, coefficients out. A subclass adds the update."""

    _options: Options
    _source: Source
    #: whether a backend may have a `run_step` for the rule: to ask, `_updates` has to make the state
    _may_run_at_once = False
    #: torch's protocol: a GradScaler calls `step` with attributes `grad_scale` and `found_inf`, overflow or not
    _step_supports_amp_scaling = True

    def _set_options(
        self,
        weighting: Weighting | None,
        max_norm: float | None,
        rescale: Rescale,
        private: Private,
        loss_floor: float,
        gram: Source | str | None,
        backend: str | None,
    ) -> None:
        op = type(self).__name__
        self._options = check_options(op, weighting, max_norm, rescale, loss_floor, private, backend)
        self._source = choose(op, gram, self._options).begin()
        self._forget()

    def _set_precision(self, state_dtype: torch.dtype | None, master_weights: bool) -> None:
        if state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"{type(self).__name__}: state_dtype is {state_dtype}; choose torch.float32 or torch.bfloat16, or None "
                "for the parameters' dtype"
            )
        check_flag(f"{type(self).__name__}: master_weights", master_weights)
        self._precision = state_dtype, master_weights

    def _zeros(self, p: Tensor) -> Tensor:
        """A moment's start."""
        if self._ranks is not None:
            return self._ranks.zeros(p, self._precision[0])
        return torch.zeros_like(p, dtype=self._precision[0], memory_format=torch.preserve_format)

    def _masters(self, params: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Master copies of parameters of one dtype, as an update's state; nothing if they have none.

        One that the parameter is not the rounding of is made anew: somebody else has written the parameter, in a way
        that its version counts.
        """
        if not self._precision[1] or params[0].dtype not in (torch.float16, torch.bfloat16):
            return {}
        ranks = self._ranks
        self._mastered += params
        for p in params:
            if "master" in self.state[p] and p._version == self._versions.get(p):
                continue
            now = p.detach().to(torch.float32, copy=True) if ranks is None else ranks.master(p)
            master = self.state[p].get("master")
            if master is None:
                self.state[p]["master"] = now
            else:
                master.copy_(torch.where(master.to(p.dtype) == now.to(p.dtype), master, now))
        return {"masters": [self.state[p]["master"] for p in params]}

    def _forget(self) -> None:
        self._sets = GradientSets()
        self._ranks: Ranks | None = None  # a copy's parameters are others
        self._balance: Balance | None = None
        self._skipped_steps: Tensor | None = None
        self._plan: tuple[Any, list[_Bucket]] | None = None
        self._looked = False  # for other ranks
        self._mastered: list[Tensor] = []  # whose master copies this step takes
        self._versions: dict[Tensor, int] = {}  # of parameters with a master copy, as their last step left them

    @property
    def weighting(self) -> Weighting:
        """How the Gram matrix becomes weights."""
        return self._options.weighting

    @property
    def balance(self) -> Balance | None:
        """The last step's `Balance`; None before the first. Reading it on CUDA stalls, keeping it does not."""
        return self._balance

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives that the gradients gathered now belong to, in their order."""
        return self._sets.names

    @property
    def max_norm(self) -> float | None:
        """What the combined direction is clipped to; may be set at any time, to None for no clipping."""
        return self._options.max_norm

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        options = replace(self._options, max_norm=value)
        check_options(type(self).__name__, options.weighting, value, options.rescale, options.loss_floor)
        self._options = options

    @property
    def skipped_steps(self) -> Tensor:
        """Scalar int64 on the gradients' device: steps that changed nothing, since the optimizer was made."""
        return torch.zeros((), dtype=torch.int64) if self._skipped_steps is None else self._skipped_steps.clone()

    def backward(
        self,
        losses: Losses,
        *,
        share: float = 1.0,
        scaler: torch.amp.GradScaler | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
        retain_graph: bool = False,
        inputs: Sequence[Tensor] | None = None,
    ) -> None:
        """Run one backward pass per loss and add its gradients to that objective's set, or as `gram` says.

        Call it several times between steps to accumulate. `.grad` of the parameters stays as it was.

        Args:
            losses: K scalar tensors, as a sequence or as a dict from names; one tensor is one objective. Pass them as
                they are: neither divided for accumulation nor scaled for fp16.
            share: this call's part of the batch under accumulation, such as 1 / 4; the shares of a step add up to 1.
                The step is that of the weighted mean of the calls' losses.
            scaler: a `torch.amp.GradScaler` for fp16: gradients are made times its scale, and the step takes it out
                again. Follow with `scaler.step(optimizer)` and `scaler.update()`, as with any optimizer.
            features: the representation at which `sources.Feature()` measures.
            retain_graph: keep the graph after the last pass; it is always freed otherwise.
            inputs: restrict the passes to these leaves.

        Raises:
            TypeError, ValueError: a bad loss: not scalar, needs no gradient, not positive under a logarithm; other
                objectives or another scaler than before; a `share` outside of (0, 1]; a sparse gradient; nothing that
                the source could measure. Parameters and state are as before.
        """
        params = self._params()
        if not self._looked:
            self._look(params)
        self._sets.collect(
            losses,
            params,
            self._source,
            self._options,
            self._ranks,
            share=share,
            scaler=scaler,
            balanced=self._balanced(),
            features=features,
            retain_graph=retain_graph,
            inputs=inputs,
            op=f"{type(self).__name__}.backward",
        )

    def _params(self) -> list[Tensor]:
        """Of all groups, in their order."""
        return [p for group in self.param_groups for p in group["params"]]

    def _balanced(self) -> list[bool]:
        """For each parameter, whether its group is balanced."""
        return [group["balance"] for group in self.param_groups for _ in group["params"]]

    def _look(self, params: Sequence[Tensor]) -> None:
        """Find out, once, whether other ranks train these parameters."""
        if self._ranks is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            from .distributed.find import find

            self._ranks = find(params, self._source, f"{type(self).__name__}.backward")
        self._looked = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Balance the gradients that `backward` gathered and update the parameters.

        Args:
            closure: evaluates the model again: calls zero_grad() and backward(losses), returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: `backward` was not called since the last zero_grad(); or a GradScaler takes this step whose
                scale `backward` was not given.

        Effects: no host sync on CUDA, but in the first step with new parameters or objectives and, where gradients are
            zero in place of None, in few later ones (see `reach.Reach`); and, for `DTOSGD` with dampening, once.
            If a gradient or loss is not finite, nothing changes and the step counts
            in `skipped_steps`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._sets.losses is None and self._initializes():
            return loss
        try:
            self._balance = replace(self._take_step(), names=self._sets.names)
        except BaseException:
            for name in ("grad_scale", "found_inf"):  # of a scaler, which now will not take them back
                self.__dict__.pop(name, None)
            raise
        self._sets.used = True
        return loss

    def _take_step(self) -> Balance:
        """A step with the gradient sets as they are."""
        if self._sets.losses is None:
            raise RuntimeError(
                f"{type(self).__name__}.step: there are no gradients; call backward(losses) of this optimizer first "
                "(not loss.backward())"
            )
        if self._ranks is not None and self._ranks.unsynced:
            raise RuntimeError(
                f"{type(self).__name__}.step: the gradients were gathered inside no_sync() and are those of this rank "
                "alone; call backward outside of it for the last part of the batch"
            )
        if self._sets.scaler is None and hasattr(self, "found_inf"):  # set by a scaler around step
            raise RuntimeError(
                f"{type(self).__name__}.step: a GradScaler takes this step, but backward did not get it; pass the "
                "losses as they are, and the scaler: optimizer.backward(losses, scaler=scaler)"
            )
        self._mastered = []
        self._settle()
        if self._sets.align(self._params()) and self._sets.watch is not None:
            self._sets.reach.begin(self._sets.names, self._sets.params)
            self._sets.watch.start(self._sets.grads, self._balanced(), self._sets.reach)  # looks at what is there now
            self._sets.watch.finish()
        self._sets.reach.begin(self._sets.names, self._sets.params)
        self._sets.reach.look(self._sets.grads, self._ranks)
        buckets = self._buckets()
        lists = [bucket.gradients(self._sets.grads) for bucket in buckets]
        ranks = self._ranks
        if ranks is not None and ranks.shards:
            lists = [[ranks.local(values) for values in grads] for grads in lists]
        record = self._run(buckets, lists)
        self._versions.update({p: p._version for p in self._mastered})
        self._count(record.skipped)
        if self._sets.scaler is not None:
            # torch's scaler looks for overflows in `.grad`, where no gradient set is: this is where it keeps what it
            # has found, and `update` reads it
            found = self._sets.scaler._per_optimizer_states[id(self)]["found_inf_per_device"]
            found[record.norm.device] = self._sets.overflowed(record).float()
        commit(self._sets, self._options, record)
        return record

    def _initializes(self) -> bool:
        """Make the state, if `torch.distributed.checkpoint` asks for it: by a step with gradients and lr of zero."""
        if any(group["lr"] != 0 for group in self.param_groups):
            return False
        owners = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not owners or any(p.grad.any() for _, p in owners):
            return False
        for group, p in owners:
            self._updates(_Bucket(group, Role.SHARED, (0,), [p], [0]), [[p]])
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradient sets, and clear `.grad` as torch does.

        Args:
            set_to_none: False keeps the memory of the sets and fills it with zeros.
        """
        super().zero_grad(set_to_none)
        if self._ranks is not None:
            self._ranks.unsynced = False
        if set_to_none:
            self._sets.clear()
        else:
            self._sets.zero()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; `balance=False` in it keeps its parameters out of the balance (see the class).

        Raises:
            TypeError, ValueError: a complex parameter, or a `balance` that is not True or False, besides what torch
                refuses.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group["params"]:
                check_params(type(self).__name__, group["params"])
            group.setdefault("balance", True)
            check_flag(f"{type(self).__name__}: balance of a group", group["balance"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """As torch, and what torch's optimizers ignore: the memory of the weighting and of the Gram's source.

        They stand under "weighting" and "gram", if they remember anything; under "reach" stands which objectives reach
        which parameters, as far as that is known (see `reach.Reach`).
        """
        self._settle()
        # before the user's hooks, so that they see it
        handle = self.register_state_dict_post_hook(lambda _, state: {**state, **self._memories()}, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _memories(self) -> dict[str, Any]:
        memories = {"gram": self._source.state_dict(), "reach": self._sets.reach.state_dict(self._params())}
        memories = {name: memory for name, memory in memories.items() if memory}
        weighting = self.weighting
        return {"weighting": weighting.state_dict(), **memories} if isinstance(weighting, Stateful) else memories

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of the torch optimizer it stands for.

        That one knows no `balance` of a group and no memory of the weighting; they stay as they are.

        The memory of another kind of source is not used; this optimizer's measures anew then.

        Args:
            state_dict: what `state_dict()` returned.

        Raises:
            TypeError, ValueError: it is no optimizer's state, its groups are not those of this optimizer, its moments
                are of other shapes, or its weighting's memory is another rule's. Nothing has changed then.
        """
        self._settle()
        loaded: list[dict[str, Any]] = []

        def before(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            loaded.append(self._checked_state(state))
            return loaded[-1]

        # what the user's hooks before have made of it is taken, and those after find it taken
        handles = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(lambda _: self._take_over(loaded[-1]), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _checked_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state that is to be loaded, with this optimizer's `balance` of groups that have none.

        Raises:
            ValueError: it is no optimizer's, its moments are of other shapes, or its weighting's memory is another
                rule's.
            TypeError: a group's `balance` is not True or False.
        """
        op = f"{type(self).__name__}.load_state_dict"
        if not state.keys() >= {"state", "param_groups"}:
            raise ValueError(
                f"{op}: the state has {sorted(map(str, state))}, expected 'state' and 'param_groups'; pass what "
                "state_dict() of an optimizer returned"
            )
        groups = state["param_groups"]
        if len(groups) == len(self.param_groups):
            groups = [
                {"balance": own["balance"], **group} for own, group in zip(self.param_groups, groups, strict=True)
            ]
        for group in groups:
            check_flag(f"{op}: balance of a group", group.get("balance", True))
        self._check_shapes(state)
        if isinstance(self.weighting, Stateful) and "weighting" in state:
            copy.copy(self.weighting).load_state_dict(state["weighting"])
        return {**state, "param_groups": groups}

    def _take_over(self, state: dict[str, Any]) -> None:
        """What torch does not know of a state that it has loaded."""
        self._versions.clear()
        self._restore_precision(state)
        if (ranks := self._ranks) is not None:
            for p, held in self.state.items():
                for name, value in held.items():
                    if name != "step" and isinstance(value, Tensor):
                        held[name] = ranks.part(value, p)
        if isinstance(self.weighting, Stateful) and "weighting" in state:
            self.weighting.load_state_dict(state["weighting"])
        self._source.load_state_dict(state.get("gram", {}))
        self._sets.reach.load_state_dict(state.get("reach", {}), self._params())

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        """Refuse moments of another shape than their parameter: nothing would notice, if they have as many elements."""
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = self._params()
        if len(saved) != len(params):
            return  # which torch refuses
        flat = self._ranks is not None  # a state in parts is a list of numbers
        for t, (i, p) in enumerate(zip(saved, params, strict=True)):
            for name, value in state_dict["state"].get(i, {}).items():
                if name == "step" or not isinstance(value, Tensor) or value.shape == p.shape:
                    continue
                if flat and value.shape == (p.numel(),):
                    continue
                raise ValueError(
                    f"{type(self).__name__}.load_state_dict: {name} of parameter {t} has shape {list(value.shape)}, "
                    f"expected {list(p.shape)}; load a state of the same parameters, in the same order"
                )

    def _restore_precision(self, state_dict: dict[str, Any]) -> None:
        """Torch has rounded the loaded state to the parameters' dtype; take it over again where it has another."""
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if name == "step" or not isinstance(value, Tensor) or not value.is_floating_point():
                    continue
                dtype = torch.float32 if name == "master" else self._precision[0] or p.dtype
                if dtype != p.dtype:
                    self.state[p][name] = value.to(p.device, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_options": self._options,
            "_source": self._source,
            "_precision": self._precision,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_sets" not in self.__dict__:  # a copy or an unpickled optimizer
            self._forget()
        for group in self.param_groups:
            group.setdefault("balance", True)

    def _buckets(self) -> list[_Bucket]:
        """The buckets of this step; made anew only if groups, parameters or who is reached have changed."""
        grads = self._sets.grads
        key = (
            self._sets.weighed is None,
            self._sets.names,
            self._sets.reach.version,
            [[g is None for g in row] for row in grads],
            [
                (id(group), group["balance"], [(id(p), p.dtype, p.device) for p in group["params"]])
                for group in self.param_groups
            ],
        )
        if self._plan is None or self._plan[0] != key:
            self._plan = (key, self._make_buckets())
            moments = [self._precision[0]] if self._precision[0] is not None else []
            self._options = replace(self._options, limit=limit_of([*moments, *(p.dtype for p in self._params())]))
        return self._plan[1]

    def _make_buckets(self) -> list[_Bucket]:
        buckets: dict[Any, _Bucket] = {}
        grads = self._sets.grads
        K = len(grads)
        position = -1
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                position += 1
                reach = tuple(i for i, row in enumerate(grads) if row[position] is not None)
                if not reach:
                    continue
                # one set for all objectives is their weighted sum already, for unbalanced parameters as well
                balanced = group["balance"] or self._sets.weighed is not None
                known = self._sets.reach.of(position, [row[position] for row in grads])
                role = self._options.role(balanced, known, K)
                key = (index, role, reach, p.dtype, p.device)
                bucket = buckets.setdefault(key, _Bucket(group, role, reach, [], []))
                bucket.params.append(p)
                bucket.positions.append(position)
        return list(buckets.values())

    def _run(self, buckets: list[_Bucket], lists: list[list[list[Tensor]]]) -> Balance:
        """Solve and update: by one function of the backend, where it has one for such a step, else by two."""
        options, scale = self._options, self._sets.scale
        updates: list[Update] | None = None
        exact = type(self._sets.source) is Exact and self._sets.weighed is None
        whole_tensors = self._ranks is None or not self._ranks.shards
        asks = self._may_run_at_once and exact and scale is None and whole_tensors and bool(buckets)
        if asks and runs_steps(buckets[0].params[0].device, options):
            assert self._sets.losses is not None
            updates = self._all_updates(buckets, lists)
            whole = None if any(map(needs_trial, updates)) else run_step(updates, self._sets.losses, options)
            if whole is not None:
                return whole
        op = f"{type(self).__name__}.step"
        record, table = solve_sets(self._sets, _by_role(buckets, lists), options, self._ranks, op)
        if _known_to_skip(record):
            return record
        if updates is None:
            updates = self._all_updates(buckets, lists)
        if scale is not None:
            table = table / scale.to(table.device)
        if self._sets.weighed is None:
            record = self._sets.source.run(updates, record, table, options, self._ranks)
        else:
            record = replace(record, skipped=run_updates(updates, table, record.skipped, options, self._ranks))
        if self._ranks is not None:
            self._ranks.after_updates()
        return record

    def _all_updates(self, buckets: list[_Bucket], lists: list[list[list[Tensor]]]) -> list[Update]:
        # last first: the Gram pass has read these gradients most recently, so they may still be in cache
        updates = [
            update
            for bucket, grads in zip(reversed(buckets), reversed(lists), strict=True)
            for update in self._updates(bucket, grads)
        ]
        ranks = self._ranks
        return updates if ranks is None else [ranks.local_update(update) for update in updates]

    def _count(self, skipped: Tensor) -> None:
        if self._skipped_steps is None:
            self._skipped_steps = torch.zeros((), dtype=torch.int64, device=skipped.device)
        # in place, so that a replayed CUDA graph counts on
        self._skipped_steps += skipped.to(self._skipped_steps.device)

    def _settle(self) -> None:
        """Take back state that the last step made, if that step turned out to be skipped and it matters."""

    def _updates(self, bucket: _Bucket, grads: list[list[Tensor]]) -> list[Update]:
        """The subclass's rule for one bucket; makes the state where there is none."""
        raise NotImplementedError


def _known_to_skip(record: Balance) -> bool:
    """Whether the host knows, without waiting for a device, that this step changes nothing."""
    return record.skipped.device.type == "cpu" and bool(record.skipped)


def _by_role(buckets: list[_Bucket], lists: list[list[list[Tensor]]]) -> dict[Role, list[Group]]:
    """The buckets' gradients over all parameter groups, so that the Gram matrix takes as few calls as it can."""
    groups: dict[Role, dict[Any, Group]] = {}
    for bucket, grads in zip(buckets, lists, strict=True):
        same_role = groups.setdefault(bucket.role, {})
        key = (bucket.reach, bucket.params[0].dtype, bucket.params[0].device)
        if key in same_role:
            grads = [[*values, *more] for values, more in zip(same_role[key][1], grads, strict=True)]
        same_role[key] = (bucket.reach, grads)
    return {role: list(found.values()) for role, found in groups.items()}


_SHARED_ARGS = """weighting: how the Gram matrix becomes weights; default `weighting.DTO()`.
        max_norm: clip the combined direction to this norm; costs no pass, as the norm comes from the Gram matrix.
        rescale: "none" multiplies gradients by pi_i / L_i (the paper); "sum" divides these by their sum, so that
            learning rates tuned for a weighted sum of the losses keep their meaning.
        private: "own": parameters that only some objectives reach (a head, a projector) stay out of the Gram and
            take those objectives' gradients at weight 1 (1 / L_i with rescale "none"); "balanced": all in the Gram.
        loss_floor: smallest loss divided by.
        gram: how the Gram matrix is obtained: "exact", "overlap", "lag", or an object of `dtokd_kernels.sources`:
            `Probe`, `Feature`, `Every`, `Ema`. Default: "exact", or "none", one backward pass of the weighted sum of
            the losses, for a weighting that needs no Gram matrix.
        backend: "cuda", "triton", "cpu" or "reference"; default: the best for the parameters' device.
        state_dtype: dtype of the moments, float32 or bfloat16; default: the parameter's, as in torch.
        master_weights: keep a float32 copy of each half-precision parameter in the state ("master"), of which the
            parameter is the rounding, so that small updates are not lost. A parameter that somebody else has written
            counts instead of its copy; what is written through `p.data` is not noticed.
        foreach, fused: accepted as torch's, and nothing follows from them: `backend` says what runs.

    A parameter group takes `balance=False`: its gradient is the sum of the objectives' gradients."""


class DTOAdamW(Balanced, torch.optim.AdamW):  # noqa: D101
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
        gram: Source | str | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self._set_options(weighting, max_norm, rescale, private, loss_floor, gram, backend)
        self._set_precision(state_dtype, master_weights)
        torch.optim.AdamW.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, capturable=capturable
        )

    _may_run_at_once = True

    def _updates(self, bucket: _Bucket, grads: list[list[Tensor]]) -> list[Update]:
        group = bucket.group
        amsgrad = group["amsgrad"]
        states = [self.state[p] for p in bucket.params]
        for p, state in zip(bucket.params, states, strict=True):
            # on the parameter's device whatever `capturable` says: only there it is known whether a step is skipped
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = self._zeros(p)
                state["exp_avg_sq"] = self._zeros(p)
            elif state["step"].device != p.device:
                state["step"] = state["step"].to(p.device)
            if amsgrad and "max_exp_avg_sq" not in state:
                state["max_exp_avg_sq"] = self._zeros(p)
        beta1, beta2 = group["betas"]
        return [
            Update(
                "adamw_step",
                bucket.role,
                bucket.reach,
                bucket.params,
                grads,
                state={
                    "exp_avgs": [state["exp_avg"] for state in states],
                    "exp_avg_sqs": [state["exp_avg_sq"] for state in states],
                    "max_exp_avg_sqs": [state["max_exp_avg_sq"] for state in states] if amsgrad else [],
                    "state_steps": [state["step"] for state in states],
                    **self._masters(bucket.params),
                },
                options={
                    "lr": group["lr"],
                    "beta1": beta1,
                    "beta2": beta2,
                    "weight_decay": group["weight_decay"],
                    "eps": group["eps"],
                    "amsgrad": amsgrad,
                    "maximize": group["maximize"],
                },
            )
        ]


class DTOSGD(Balanced, torch.optim.SGD):  # noqa: D101
    __doc__ = f"""SGD on DTO-KD's balanced direction; a drop-in for `torch.optim.SGD` with K losses.

    Source: DTO-KD (ICLR 2026), Eq. 8-12.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`. `maximize` turns the
            combined direction around.
        {_SHARED_ARGS}

    `rescale` is "sum" by default: SGD feels the factor 1 / L_i as a learning rate. Weightings of raw gradients
    (`Fixed`, `PCGrad`, ...) have no such factor: with them pass "none", or their sums become means.

    With `dampening`, the step after the one that begins the momentum waits for the device once, to learn whether that
    was skipped; so capture a later one.

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
        gram: Source | str | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self._set_options(weighting, max_norm, rescale, private, loss_floor, gram, backend)
        self._set_precision(state_dtype, master_weights)
        torch.optim.SGD.__init__(self, params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)

    def _updates(self, bucket: _Bucket, grads: list[list[Tensor]]) -> list[Update]:
        group = bucket.group
        momentum = group["momentum"]
        fresh = [momentum != 0 and self.state[p].get("momentum_buffer") is None for p in bucket.params]
        if group["dampening"] != 0:
            self._begun += [p for p, f in zip(bucket.params, fresh, strict=True) if f]
        updates = []
        for first in sorted(set(fresh)):
            chosen = [i for i, f in enumerate(fresh) if f is first]
            params = [bucket.params[i] for i in chosen]
            buffers = []
            if momentum != 0:
                for p in params:
                    state = self.state[p]
                    if first:
                        state["momentum_buffer"] = self._zeros(p)
                    buffers.append(state["momentum_buffer"])
            updates.append(
                Update(
                    "sgd_step",
                    bucket.role,
                    bucket.reach,
                    params,
                    [[values[i] for i in chosen] for values in grads],
                    state={"momentum_buffers": buffers, **self._masters(params)},
                    options={
                        "lr": group["lr"],
                        "momentum": momentum,
                        "dampening": group["dampening"],
                        "weight_decay": group["weight_decay"],
                        "nesterov": group["nesterov"],
                        "maximize": group["maximize"],
                        "first": first,
                    },
                )
            )
        return updates

    def _forget(self) -> None:
        super()._forget()
        self._begun: list[Tensor] = []  # whose momentum the last step began, with dampening

    def _settle(self) -> None:
        # a buffer of zeros is as good as none, but for dampening, which the first step goes without
        if self._begun and self._balance is not None and self._balance.skipped:
            for p in self._begun:
                self.state[p].pop("momentum_buffer", None)
        self._begun.clear()
