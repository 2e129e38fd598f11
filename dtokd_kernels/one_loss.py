"""One loss whose gradient is the balanced one, for trainers that call `backward` themselves."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_options
from .gradients import Losses, checked_losses, expect, named_losses
from .ranks import Ranks, initialized
from .sources import Feature, Probe, Source, Unmeasured, choose
from .sources.source import Call
from .sources.wrapper import innermost
from .types import Balance, Rescale, Weighting
from .weighting import Stateful

_OP = "BalancedLoss"
#: Its entry in the state of an optimizer that saves it.
_ENTRY = "balanced_loss"


class BalancedLoss:
    """Several losses in, one loss out, whose gradient is sum_i c_i g_i with the coefficients of a weighting.

    For trainers that take one loss and call `backward` themselves, such as Hugging Face's Trainer, Lightning or
    Accelerate. All that such a trainer does with a loss and its gradient stays as it is: any optimizer, accumulation,
    clipping and the norm that it reports, GradScaler, DDP. The coefficients are constants, found before the one
    backward pass. The value is the plain sum of the losses, for logs and schedules.

    Every parameter takes sum_i c_i g_i, those that only some objectives reach too. Under `torch.no_grad` (evaluation)
    the sum of the losses is returned, and nothing is measured or remembered. Each call counts as a step: with
    accumulation each micro-batch is weighed by itself, and a memory advances with each.

    With several processes losses and measurements are averaged over them, so that all have the same coefficients; call
    it equally often on all.

    Args:
        weighting: as in `balance`; default `DTO()`.
        gram: where the Gram matrix is measured, for weightings that need one: `sources.Feature` (cheap: the losses down
            to a representation that all of them share, such as the student's logits), `sources.Probe(block)`,
            `sources.Probe(model)` (exact, by K backward passes besides the one), or `sources.Every` or `sources.Ema` of
            these.
        rescale, loss_floor: as in `balance`.
        process_group: the processes that train copies or shards of the model; default: all, where `torch.distributed`
            is initialized.

    Raises:
        TypeError, ValueError: no such option; a `gram` that measures K gradients of an optimizer, such as "exact".

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> balanced = dk.BalancedLoss(gram=dk.sources.Probe(w))
        >>> loss = balanced({"task": (w - 1).square().sum(), "distill": (w - torch.tensor([-1.0, 1.0])).square().sum()})
        >>> loss.backward()
        >>> loss.item(), w.grad, balanced.balance.weights
        (4.0, tensor([ 0., -1.]), tensor([0.5000, 0.5000], dtype=torch.float64))
    """

    def __init__(
        self,
        weighting: Weighting | None = None,
        *,
        gram: Source | str | None = None,
        rescale: Rescale = "none",
        loss_floor: float = 1e-8,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        self._options = check_options(_OP, weighting, None, rescale, loss_floor)
        self._source = choose(_OP, gram, self._options).begin()
        self._group = process_group
        self._balance: Balance | None = None
        inner = innermost(self._source)
        if not isinstance(inner, (Feature, Probe, Unmeasured)) or (isinstance(inner, Probe) and inner.of is None):
            raise ValueError(
                f"{_OP}: gram is {gram!r}, but one loss is weighed before its only backward pass; pass "
                "gram=dk.sources.Feature() to measure at the features given to each call, or "
                "gram=dk.sources.Probe(model) to measure at a module's parameters, or take a weighting that needs no "
                "Gram matrix, without gram"
            )
        self._params = list(inner.of or []) if isinstance(inner, Probe) else []

    @property
    def weighting(self) -> Weighting:
        """How the Gram matrix becomes weights."""
        return self._options.weighting

    @property
    def balance(self) -> Balance | None:
        """The last call's `Balance`; None before the first. Its gradients and norms are those where `gram` measures."""
        return self._balance

    def __call__(
        self,
        losses: Losses,
        *,
        features: Tensor | Sequence[Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """The one loss.

        Args:
            losses: K scalar tensors, as a sequence or as a dict from names. Pass them as they are: neither divided for
                accumulation nor scaled for fp16.
            features: the representation at which `sources.Feature()` measures.
            scaler: the `torch.amp.GradScaler` that the trainer scales the loss with, so that what is measured in fp16
                does not underflow. It is not applied to what is returned.

        Returns:
            Scalar; its value is the sum of the losses.

        Raises:
            TypeError, ValueError: bad losses, as in `backward`; nothing to measure at. Nothing is remembered then.

        Effects: backward passes from the losses down to where `gram` measures; the graph stays. No host sync on CUDA,
            but for a probe's first look at zeros (see `reach.Reach`). A call that cannot be balanced (a loss or a
            measured gradient is not finite; under log-gradients a loss is not positive) has coefficients of zero, or
            NaN if there is a scaler, so that it skips the step.
        """
        if not torch.is_grad_enabled():
            return torch.stack(_aligned(named_losses(losses, _OP, graph=False)[1])).sum()
        ranks = self._ranks()
        try:
            names, values = checked_losses(losses, self._options, ranks, _OP)
            expect(names, self._options)
        except (TypeError, ValueError):
            if ranks is not None:
                ranks.refuse()
            raise
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        source = Unmeasured() if self._options.frozen else self._source
        device = values[0].device
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                current = torch.stack([v.detach().reshape(()).to(device, torch.float64) for v in values])
                if ranks is not None:
                    current = ranks.agree(current, names, 1, _OP)
                scale = None if scaler is None else scaler.scale(torch.ones((), device=device)).double()
                chosen = [features] if isinstance(features, Tensor) else features
                call = Call(_OP, names, values, current, self._params, chosen, scale, ranks)
                record = replace(source.weigh(call, self._options), names=names)
                instead = torch.full_like(record.norm, 0.0 if scaler is None else torch.nan)
                coefficients = torch.where(record.skipped, instead, record.coefficients).to(device)
                self._balance = record
                source.commit(names, record)
                if isinstance(self.weighting, Stateful):
                    self.weighting.commit(record.skipped)
        finally:
            self._source.release()
        aligned = _aligned(values)
        return _Weighted.apply(coefficients.to(aligned[0].dtype), *aligned)

    def _ranks(self) -> Ranks | None:
        """The other processes; None if there are none."""
        if not initialized() or torch.distributed.get_world_size(self._group) == 1:
            return None
        from .distributed.averaged import Averaged

        return Averaged(self._group, _OP)

    def state_dict(self) -> dict[str, Any]:
        """What the weighting and the source of the Gram matrix remember; empty if they remember nothing."""
        rule = self.weighting.state_dict() if isinstance(self.weighting, Stateful) else {}
        found = {"weighting": rule, "gram": self._source.state_dict()}
        return {name: memory for name, memory in found.items() if memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: it is another weighting's.
        """
        if isinstance(self.weighting, Stateful):
            self.weighting.load_state_dict(state.get("weighting", {}))
        self._source.load_state_dict(state.get("gram", {}))

    def save_with(self, optimizer: torch.optim.Optimizer) -> None:
        """Have the memory saved and loaded with an optimizer's state, under "balanced_loss".

        So whatever a trainer's checkpoints hold of the optimizer holds this too. A state without the entry leaves the
        memory as it is, and so does one that is refused: by the optimizer, or as another weighting's.
        """
        loading: list[Mapping[str, Any]] = []

        def check(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
            loading[:] = [state[_ENTRY]] if _ENTRY in state else []
            if loading and isinstance(self.weighting, Stateful):
                copy.copy(self.weighting).load_state_dict(loading[0].get("weighting", {}))

        def take_over(_: torch.optim.Optimizer) -> None:
            while loading:
                self.load_state_dict(loading.pop())

        optimizer.register_state_dict_post_hook(lambda _, state: {**state, _ENTRY: self.state_dict()})
        optimizer.register_load_state_dict_pre_hook(check)
        optimizer.register_load_state_dict_post_hook(take_over)


def _aligned(values: Sequence[Tensor]) -> list[Tensor]:
    """Scalars of one dtype, float32 or float64, on the first one's device."""
    dtype = functools.reduce(torch.promote_types, (v.dtype for v in values), torch.float32)
    return [v.reshape(()).to(values[0].device, dtype) for v in values]


class _Weighted(torch.autograd.Function):
    """The sum of scalars, with the gradient of their weighted sum."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, *values: Tensor) -> Tensor:
        """The plain sum."""
        ctx.save_for_backward(coefficients)
        return torch.stack(values).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """What each loss's own backward pass starts with."""
        (coefficients,) = ctx.saved_tensors
        return None, *(coefficients * grads[0]).unbind()
