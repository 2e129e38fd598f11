"""The state of a balanced optimizer: what of it is made, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_flag
from .gradients import GradientSets
from .ranks import Ranks
from .reach import Reach
from .rules import Rule
from .sources import Source
from .types import Options, Weighting
from .weighting import Stateful


class Kept(torch.optim.Optimizer):
    """What a balanced optimizer remembers, under torch's names, beside the memories of its weighting and its source."""

    #: the update rule
    _rule: Rule
    _options: Options
    _source: Source
    _sets: GradientSets
    _ranks: Ranks | None
    #: dtype of the moments, None for the parameters', and whether half-precision parameters have a master copy
    _precision: tuple[torch.dtype | None, bool]
    #: of parameters with a master copy, as their last step left them
    _versions: dict[Tensor, int]

    def _settle(self) -> None:
        """Bring the state to what the last step has left."""
        raise NotImplementedError

    def _changed(self) -> None:
        """Forget what was made of the state that was there before."""
        raise NotImplementedError

    @property
    def weighting(self) -> Weighting:
        """How the Gram matrix becomes weights."""
        return self._options.weighting

    def _params(self) -> list[Tensor]:
        """Of all groups, in their order."""
        return [p for group in self.param_groups for p in group["params"]]

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """What the rule needs of a parameter's state; made where there is none."""
        state = self.state[p]
        needed = [name for name, number in self._rule.states.items() if number is None or group[number]]
        for name in needed:
            if state.get(name) is None:
                state[name] = self._zeros(p)
        if self._rule.counts_steps:
            # on the parameter's device whatever `capturable` is: only there it is known whether a step is skipped
            step = state.get("step")
            if step is None:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            elif step.device != p.device or step.dtype is not torch.float32:
                state["step"] = step.to(p.device, torch.float32)
            needed.append("step")
        if self._has_master(p):
            if state.get("master") is None:
                state["master"] = self._master(p)
                self._versions[p] = p._version
            needed.append("master")
        return {name: state[name] for name in needed}

    def _zeros(self, p: Tensor) -> Tensor:
        """A moment's start."""
        if self._ranks is not None:
            return self._ranks.zeros(p, self._precision[0])
        return torch.zeros_like(p, dtype=self._precision[0], memory_format=torch.preserve_format)

    def _has_master(self, p: Tensor) -> bool:
        return self._precision[1] and p.dtype in (torch.float16, torch.bfloat16)

    def _master(self, p: Tensor) -> Tensor:
        """A parameter's float32 copy."""
        return p.detach().to(torch.float32, copy=True) if self._ranks is None else self._ranks.master(p)

    def _refresh_masters(self, params: Sequence[Tensor]) -> None:
        """Make those copies anew that the parameter is not the rounding of.

        Other code has written such a parameter, in a way that its version counts.
        """
        if not self._precision[1]:
            return
        for p in params:
            if self._has_master(p) and p._version != self._versions.get(p):
                now, master = self._master(p), self.state[p]["master"]
                master.copy_(torch.where(master.to(p.dtype) == now.to(p.dtype), master, now))

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

        A state of torch's optimizer has no `balance` of a group and no memory of the weighting: these stay as they are.

        The memory of another kind of source is not used; this optimizer's measures anew then.

        Args:
            state_dict: what `state_dict()` returned.

        Raises:
            TypeError, ValueError: it is no optimizer's state, its groups are not those of this optimizer, its moments
                are of other shapes, its weighting's memory is another rule's, or another memory is damaged. Nothing has
                changed then.
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
            ValueError: it is no optimizer's, its moments are of other shapes, its weighting's memory is another rule's,
                or that of the Gram's source or of what is reached is damaged.
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
        for name, load in (
            ("gram", self._source.begin().load_state_dict),
            ("reach", lambda held: Reach().load_state_dict(held, self._params())),
        ):
            try:
                load(state.get(name, {}))
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{op}: {name!r} of the state is not what state_dict() returned ({error}); leave it out, and it is "
                    "found out anew"
                ) from error
        return {**state, "param_groups": groups}

    def _take_over(self, state: dict[str, Any]) -> None:
        """What torch does not take over of a state that it has loaded."""
        self._versions.clear()
        self._changed()
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
        for t, (i, p) in enumerate(zip(saved, params, strict=True)):
            for name, value in state_dict["state"].get(i, {}).items():
                if name == "step" or not isinstance(value, Tensor) or value.shape == p.shape:
                    continue
                if self._ranks is not None and value.shape == self._ranks.shape_of(p):
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
