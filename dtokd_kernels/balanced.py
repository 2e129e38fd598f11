"""The base of the balanced optimizers: gradient sets in `backward`, one balanced step in `step`."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import backends
from .checks import check_flag, check_options, check_params
from .gradients import GradientSets, Losses
from .implementations import Numbers
from .optim_state import Kept
from .plan import Group, Plan, Step, make_parts
from .ranks import initialized
from .rows import GradientRows
from .solve import commit, solve_sets
from .sources import Exact, Source, choose
from .types import Balance, Private, Rescale, Weighting, limit_of


class Balanced(Kept):
    """What the balanced optimizers share. A subclass has an update rule, and a constructor that sets its numbers."""

    #: torch's protocol: a GradScaler calls `step` with attributes `grad_scale` and `found_inf`, overflow or not
    _step_supports_amp_scaling = True

    def _set(
        self,
        weighting: Weighting | None,
        max_norm: float | None,
        rescale: Rescale,
        private: Private,
        loss_floor: float,
        gram: Source | str | None,
        backend: str | None,
        state_dtype: torch.dtype | None,
        master_weights: bool,
    ) -> None:
        """Check and take what all constructors have in common."""
        op = type(self).__name__
        self._options = check_options(op, weighting, max_norm, rescale, loss_floor, private, backend)
        self._source = choose(op, gram, self._options).begin()
        if state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"{op}: state_dtype is {state_dtype}; choose torch.float32 or torch.bfloat16, or None for the "
                "parameters' dtype"
            )
        check_flag(f"{op}: master_weights", master_weights)
        self._precision = state_dtype, master_weights
        self._forget()

    def _forget(self) -> None:
        self._sets = GradientSets()
        self._ranks = None  # a copy's parameters are others
        self._balance: Balance | None = None
        self._skipped_steps: Tensor | None = None
        self._plan: tuple[Any, Plan] | None = None
        self._begun: list[Tensor] = []  # whose momentum the last step began, with dampening
        self._warned: set[str] = set()  # of what kernels lack
        self._looked = False  # for other ranks
        self._versions = {}

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
        """Run one backward pass per loss and add its gradients to that objective's set, or the passes of `gram`.

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

    def _balanced(self) -> list[bool]:
        """For each parameter, whether its group is balanced."""
        return [group["balance"] for group in self.param_groups for _ in group["params"]]

    def _look(self, params: Sequence[Tensor]) -> None:
        """Find out whether other ranks train these parameters, once there are ranks."""
        if self._ranks is None and initialized():
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
            If a gradient or loss is not finite, nothing changes and `skipped_steps` grows.
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
        # set by a scaler around step; the one whose it is has this optimizer among those of the iteration
        if hasattr(self, "found_inf") and id(self) not in getattr(self._sets.scaler, "_per_optimizer_states", ()):
            got = "did not get it" if self._sets.scaler is None else "got another one"
            raise RuntimeError(
                f"{type(self).__name__}.step: a GradScaler takes this step, but backward {got}; pass the losses as "
                "they are, and the scaler: optimizer.backward(losses, scaler=scaler)"
            )
        self._settle()
        if self._sets.align(self._params()) and self._sets.watch is not None:
            self._sets.reach.begin(self._sets.names, self._sets.params)
            self._sets.watch.start(self._sets.grads, self._balanced(), self._sets.reach)  # looks at what is there now
            self._sets.watch.finish()
        self._sets.reach.begin(self._sets.names, self._sets.params)
        self._sets.reach.look(self._sets.grads, self._ranks)
        plan = self._current_plan()
        rows = plan.gradients(self._sets.grads)
        ranks = self._ranks
        if ranks is not None and ranks.shards:
            rows = replace(rows, grads=ranks.local(rows.grads))
        record = self._run(plan, rows)
        self._count(record.skipped)
        if self._sets.scaler is not None:
            # torch's scaler looks for overflows in `.grad`, where no gradient set is: this is where it keeps what it
            # has found, and `update` reads it
            found = self._sets.scaler._per_optimizer_states[id(self)]["found_inf_per_device"]
            found[record.norm.device] = self._sets.overflowed(record, self._ranks).float()
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
            self._state_of(p, group)
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradient sets, and clear `.grad` as torch does.

        Args:
            set_to_none: False keeps the memory of the sets and fills it with zeros.
        """
        super().zero_grad(set_to_none)
        if self._ranks is not None:
            self._ranks.cleared()
        if set_to_none:
            self._sets.clear()
        else:
            self._sets.zero()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; `balance=False` in it keeps its parameters out of the balance (see the class).

        On several ranks all of them call it, and parameters outside of the attached modules become those of rank 0.

        Raises:
            TypeError, ValueError: a complex parameter, a `balance` that is not True or False, an option of torch's that
                has no effect here, or a parameter that is not sharded beside some that are, besides what torch refuses.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group["params"]:
                check_params(type(self).__name__, group["params"])
            group.setdefault("balance", True)
            check_flag(f"{type(self).__name__}: balance of a group", group["balance"])
            for name, only in (("decoupled_weight_decay", True), ("differentiable", False)):
                if bool(group.get(name, only)) is not only:
                    raise ValueError(
                        f"{type(self).__name__}: {name} of a group is {group[name]!r}, which torch's optimizer follows "
                        "and this one does not; leave it out"
                    )
            if self._ranks is not None:
                self._ranks.adopt(group["params"])
            self._looked = False  # the new ones may belong to a module of several ranks
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {
            **super().__getstate__(),
            "_options": self._options,
            "_source": self._source,
            "_precision": self._precision,
            "reach": self._sets.reach.state_dict(self._params()),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_sets" not in self.__dict__:  # a copy or an unpickled optimizer
            self._forget()
            self._sets.reach.load_state_dict(self.__dict__.pop("reach", {}), self._params())
        for group in self.param_groups:
            group.setdefault("balance", True)

    def _current_plan(self) -> Plan:
        """The plan of this step; made anew only if groups, parameters or what is reached have changed."""
        grads, optional = self._sets.grads, [n for n in self._rule.states.values() if n is not None]
        key = (
            self._sets.weighed is None,
            self._sets.names,
            self._sets.reach.version,
            backends.requested(self._options.backend),
            [
                (
                    id(group),
                    len(group["params"]),
                    group["balance"],
                    [bool(group[n]) for n in optional],
                    group.get("eps"),
                )
                for group in self.param_groups
            ],
            [list(map(operator.is_, row, itertools.repeat(None))) for row in grads],
        )
        if self._plan is not None and self._plan[0] == key:
            plan, params = self._plan[1], self._params()
            if all(map(operator.is_, plan.params, map(params.__getitem__, plan.positions))):
                return plan
        plan = self._make_plan()
        self._plan = (key, plan)
        moments = [self._precision[0]] if self._precision[0] is not None else []
        self._options = replace(self._options, limit=limit_of([*moments, *(p.dtype for p in self._params())]))
        return plan

    def _make_plan(self) -> Plan:
        grads = self._sets.grads
        owners = [(i, p) for i, group in enumerate(self.param_groups) for p in group["params"]]
        columns = list(zip(*grads, strict=True))
        positions = [t for t, column in enumerate(columns) if any(g is not None for g in column)]
        reaches: list[tuple[int, ...] | None] = []
        for t in positions:
            # one set for all objectives is their weighted sum already, for unbalanced parameters as well
            balanced = self.param_groups[owners[t][0]]["balance"] or self._sets.weighed is not None
            reaches.append(self._sets.reach.of(t, columns[t]) if balanced else None)
        rows = GradientRows.of([columns[t] for t in positions], self._options.roles(reaches))
        return Plan(
            self._rule, [owners[t][1] for t in positions], positions, [owners[t][0] for t in positions], rows.layout
        )

    def _run(self, plan: Plan, rows: GradientRows) -> Balance:
        """Solve and update: in one launch, where there is one for such a step, else in two."""
        sets, options, ranks = self._sets, self._options, self._ranks
        assert sets.losses is not None
        whole = ranks is None or not ranks.shards
        step: Step | None = None
        if type(sets.source) is Exact and sets.weighed is None and sets.scale is None and whole:
            asked = {p.device for p in plan.params}
            if len(asked) == 1 and backends.select(asked.pop(), options.backend).steps_at_once:
                step = self._step(plan, rows)
                if len(step.parts) == 1 and not step.parts[0].tried:
                    [part], [numbers] = step.parts, step.numbers
                    record = part.by.resident(part.rows, rows, numbers, sets.losses, options)
                    if record is not None:
                        self._updated(plan)
                        return record
        record, table = solve_sets(sets, rows, options, ranks, f"{type(self).__name__}.step")
        if _known_to_skip(record):
            return record
        if step is None:
            step = self._step(plan, rows)
        if sets.scale is not None:
            table = table / sets.scale.to(table.device)
        if sets.weighed is None:
            record = sets.source.run(step, record, table)
        else:
            record = replace(record, skipped=step.update(table, record.skipped))
        self._updated(plan)
        return record

    def _step(self, plan: Plan, rows: GradientRows) -> Step:
        """This step's updates: of the plan's parts, which are made where there are none for these tensors."""
        whole = self._ranks is None or not self._ranks.shards
        if not whole or not plan.is_of(self.state):
            self._make_parts(plan, rows)
        assert plan.parts is not None
        self._refresh_masters(plan.params)
        numbers = [[self._numbers(group) for group in part.groups] for part in plan.parts]
        return Step(plan.parts, rows, numbers, self._options, self._ranks)

    def _make_parts(self, plan: Plan, rows: GradientRows) -> None:
        optional = [(name, number) for name, number in self._rule.states.items() if number is not None]
        begins = []
        for p, index in zip(plan.params, plan.groups, strict=True):
            group = self.param_groups[index]
            fresh = any(group[number] and self.state[p].get(name) is None for name, number in optional)
            begins.append("first" in self._rule.numbers and fresh)
            if begins[-1] and group["dampening"] != 0:
                self._begun.append(p)
        states = [
            self._state_of(p, self.param_groups[index]) for p, index in zip(plan.params, plan.groups, strict=True)
        ]
        groups = list(zip(plan.groups, begins, strict=True))
        ranks = self._ranks
        if ranks is None:
            params = plan.params
        else:
            params, states = ranks.local_rows(plan.params, states)
        backend = self._options.backend
        plan.parts, lacking = make_parts(replace(plan, params=params), states, groups, self._numbers, rows, backend)
        # a buffer that has begun is another group's in the next step
        whole = ranks is None or not ranks.shards
        if whole and not any(begins):
            plan.hold(self.state)
        else:
            plan.held = None
        self._warn(lacking)

    def _warn(self, lacking: dict[str, list[int]]) -> None:
        total = len(self._params())
        for reason, positions in lacking.items():
            if reason not in self._warned:
                self._warned.add(reason)
                shown = ", ".join(map(str, positions[:5])) + (", ..." if len(positions) > 5 else "")
                warnings.warn(
                    f"{type(self).__name__}.step: {len(positions)} of {total} parameters (numbers {shown}) are updated "
                    f"in plain torch, which is slower: {reason}; pass backend='reference' if that is intended",
                    stacklevel=7,
                )

    def _numbers(self, group: Group) -> Numbers:
        """The rule's hyper-parameters of a parameter group."""
        index, begins = group
        options = self.param_groups[index]
        special = {"first": begins}
        if "betas" in options:
            special["beta1"], special["beta2"] = options["betas"]
        return {name: special[name] if name in special else options[name] for name in self._rule.numbers}

    def _updated(self, plan: Plan) -> None:
        if self._precision[1]:
            self._versions.update({p: p._version for p in plan.params if self._has_master(p)})
        if self._ranks is not None:
            self._ranks.after_updates()

    def _count(self, skipped: Tensor) -> None:
        if self._skipped_steps is None:
            self._skipped_steps = torch.zeros((), dtype=torch.int64, device=skipped.device)
        # in place, so that a replayed CUDA graph counts on
        self._skipped_steps += skipped.to(self._skipped_steps.device)

    def _changed(self) -> None:
        """See `Kept`: the plan is of other tensors."""
        self._plan = None

    def _settle(self) -> None:
        """Take back momentum that the last step began, if that step turned out to be skipped."""
        # a buffer of zeros is as good as none, but for dampening, which the first step goes without
        if self._begun and self._balance is not None and self._balance.skipped:
            for p in self._begun:
                self.state[p].pop("momentum_buffer", None)
        self._begun.clear()


def _known_to_skip(record: Balance) -> bool:
    """Whether the host knows, without waiting for a device, that this step changes nothing."""
    return record.skipped.device.type == "cpu" and bool(record.skipped)
