"""Losses -> gradients -> step, in the three ways that `--opt` and `--kd-balance` ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import dtokd_kernels as dk
from dtokd_kernels.balanced import Balanced
from dtokd_kernels.distributed import Replicas
from dtokd_kernels.reach import of_backward
from dtokd_kernels.sources import Source
from dtokd_kernels.types import Balance, Private, Rescale, Weighting
from dtokd_kernels.weighting import Stateful

Result = dict[str, Any]


class Stepper:
    """One micro-batch after another, then a step: with `--kd-balance none` one pass of timm's weighted sum each.

    Args:
        optimizer: what the scheduler schedules.
        scaler: of the losses; disabled where nothing is scaled.
        clip: clips `.grad`; None clips nothing.

    Attributes:
        optimizer, scaler: see above.
        balance: of the last step, if it was balanced.
        weighting: what balances, if anything does.
    """

    balance: Balance | None = None
    weighting: Weighting | None = None

    def __init__(
        self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip: Callable[[], None] | None
    ) -> None:
        self.optimizer, self.scaler, self._clip = optimizer, scaler, clip

    @property
    def lr(self) -> Any:
        """The schedule's learning rate: that of the last layer, where --layer-decay gives parts of it to the others."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def skips(self) -> bool:
        """Whether a step with a loss that is not finite changes nothing; otherwise it spoils the parameters."""
        return self.scaler.is_enabled()

    def backward(self, result: Result, parts: int) -> None:
        """Add the gradients of a micro-batch, which is one of `parts` in this step."""
        loss = result["loss"]
        self.scaler.scale(loss / parts if parts > 1 else loss).backward()

    def step(self) -> None:
        """Clip, update, and forget the gradients."""
        if self._clip is not None:
            self.scaler.unscale_(self.optimizer)
            self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """All that later steps depend on, besides the parameters; several ranks call it together."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


class Averaged(Stepper):
    """What balanced steps share: they skip what is not finite, and average each objective's gradients over ranks."""

    skips = True
    _ranks: Replicas | None = None

    def attach(self, module: DistributedDataParallel, shard: bool) -> None:
        """Average gradient sets over ranks; with `shard` each keeps a part of them and of the state."""
        self._ranks = dk.distributed.attach(self.optimizer, module, shard=shard)

    def state_dict(self) -> dict[str, Any]:
        """Also of the ranks."""
        state = super().state_dict()
        return state if self._ranks is None else {**state, "ranks": self._ranks.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of one process or several."""
        super().load_state_dict(state)
        if self._ranks is not None and "ranks" in state:
            self._ranks.load_state_dict(state["ranks"])


class Filled(Averaged):
    """Any optimizer, on gradients that `dtokd_kernels.backward` has balanced."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        clip: Callable[[], None] | None,
        *,
        weighting: Weighting,
        gram: Source | str | None,
        private: Private,
        rescale: Rescale,
    ) -> None:
        super().__init__(optimizer, scaler, clip)
        self.weighting, self._gram, self._private, self._rescale = weighting, gram, private, rescale

    def backward(self, result: Result, parts: int) -> None:
        """Balance this micro-batch."""
        self.balance = dk.backward(
            losses_of(result),
            self._params(),
            self.weighting,
            gram=self._gram,
            private=self._private,
            rescale=self._rescale,
            scaler=self.scaler,
            share=1 / parts,
        )

    def state_dict(self) -> dict[str, Any]:
        """Also of the weighting, of the Gram's source and of reach, which an optimizer of ours has in its own."""
        state = super().state_dict()
        if isinstance(self.weighting, Stateful):
            state["weighting"] = self.weighting.state_dict()
        if isinstance(self._gram, Source):
            state["gram"] = self._gram.state_dict()
        if self.balance is not None:
            reach = of_backward(self._params())
            reach.begin(self.balance.names, self._params())
            state["reach"] = reach.state_dict(self._params())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also of the weighting, of the Gram's source and of reach."""
        super().load_state_dict(state)
        if isinstance(self.weighting, Stateful):
            self.weighting.load_state_dict(state["weighting"])
        if isinstance(self._gram, Source):
            self._gram.load_state_dict(state["gram"])
        of_backward(self._params()).load_state_dict(state.get("reach", {}), self._params())

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]


class Fused(Averaged):
    """dtoadamw and dtosgd: gradient sets in, weights and update in the step; clipped by the Gram matrix."""

    optimizer: Balanced

    def __init__(self, optimizer: Balanced, scaler: torch.amp.GradScaler) -> None:
        super().__init__(optimizer, scaler, None)

    @property
    def balance(self) -> Balance | None:  # type: ignore[override]
        """Of the last step."""
        return self.optimizer.balance

    @property
    def weighting(self) -> Weighting:  # type: ignore[override]
        """That of the optimizer."""
        return self.optimizer.weighting

    def backward(self, result: Result, parts: int) -> None:
        """One pass per objective, or what the Gram's source asks for."""
        self.optimizer.backward(losses_of(result), share=1 / parts, scaler=self.scaler)

    def state_dict(self) -> dict[str, Any]:
        """As of one process, whatever the ranks: another number of them can go on."""
        if self._ranks is None:
            return super().state_dict()
        optimizer = dk.distributed.whole_state(self.optimizer)
        return {"optimizer": optimizer, "scaler": self.scaler.state_dict(), "ranks": self._ranks.state_dict()}


def losses_of(result: Result) -> dict[str, Tensor]:
    """What is balanced, in float32."""
    return {name: loss.float() for name, loss in result["objectives"].items()}


def clipping(limit: float | None, mode: str, parameters: Iterable[Tensor]) -> Callable[[], None] | None:
    """Timm's clipping of `.grad`."""
    if limit is None:
        return None
    kept = list(parameters)
    return lambda: dispatch_clip_grad(kept, limit, mode=mode)
