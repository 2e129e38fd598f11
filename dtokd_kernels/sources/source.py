"""What a source of the Gram matrix decides, and the exact one, which all others change in some point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..plan import Step
from ..ranks import Ranks
from ..reach import Reach
from ..rows import GradientRows
from ..types import Balance, Options
from ..watch import Watch


@dataclass(frozen=True)
class Call:
    """One call of `backward` before its backward pass over the weighted sum.

    Attributes:
        op: what error messages call it.
        names: of the objectives.
        values: their losses, with their graph.
        losses: [K] float64, the values without it.
        params: the leaves whose gradients are collected.
        features: what the user passed as shared representation.
        scale: scalar float64, what gradients are multiplied with while they are made (the scale of a GradScaler); None
            for 1.
        ranks: the other processes that train the same model; None if there are none.
    """

    op: str
    names: tuple[str, ...]
    values: Sequence[Tensor]
    losses: Tensor
    params: Sequence[Tensor]
    features: Sequence[Tensor] | None
    scale: Tensor | None
    ranks: Ranks | None

    def gradients(self, value: Tensor, at: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of one of `values` at some tensors, times `scale`; the graph is kept."""
        root = None if self.scale is None else root_gradient(value, self.scale)
        return list(torch.autograd.grad(value, at, root, retain_graph=True, allow_unused=True))


def root_gradient(value: Tensor, factor: Tensor | float) -> Tensor:
    """What a backward pass from `value` (one number) starts with, to make the gradient times `factor`."""
    if isinstance(factor, Tensor):
        return factor.to(value.device, value.dtype).reshape(value.shape)
    return torch.full_like(value, factor)


@dataclass(frozen=True)
class Gathered:
    """What the backward passes of a step have left, one for each objective.

    Attributes:
        op: what error messages call the step.
        names: of the objectives.
        losses: [K] float64.
        params: whose gradients were collected.
        rows: the gradients.
        scale: scalar float64, what the gradients were multiplied with; None for 1.
        watch: what `Source.watch` returned for these gradients.
        reach: which objectives reach which parameters, as the rows' roles have it.
        ranks: the other processes that train the same model; None if there are none.
    """

    op: str
    names: tuple[str, ...]
    losses: Tensor
    params: Sequence[Tensor]
    rows: GradientRows
    scale: Tensor | None
    watch: Watch | None
    reach: Reach
    ranks: Ranks | None


def remember(old: Tensor, new: Tensor, skipped: Tensor) -> Tensor:
    """What a step leaves in a source's memory: `old` if it was skipped, else `new`; decided on the device.

    Written into `old`, unless that was loaded on another device, so that a replayed CUDA graph finds what its last
    replay has left. So a `Balance` must not share the memory of a source.
    """
    skipped = skipped.to(new.device)
    if old.device != new.device:
        return torch.where(skipped, old.to(new.device), new)
    return torch.where(skipped, old, new, out=old)


@dataclass(eq=False)
class Source:
    """Where the Gram matrix comes from; the base is the exact one: K backward passes, products in `step`.

    A source decides how the backward passes run. Either each objective has one of its own, and `solve` weighs the K
    gradients in `step`; or `weigh` finds, before the only full pass, what the losses are multiplied with. Its fields
    are what the user chose; what it remembers from step to step is in `state_dict`.
    """

    @property
    def measures_in_step(self) -> bool:
        """Whether it needs `run`, which `backward` for other optimizers has not."""
        return False

    def begin(self) -> Source:
        """The same choice without memory, for an optimizer of its own."""
        return self

    def one_pass(self, names: tuple[str, ...], params: Sequence[Tensor]) -> bool:
        """Whether the step that now begins takes one full backward pass, of the weighted sum of the losses.

        Args:
            names: of its objectives.
            params: whose gradients are collected.
        """
        return False

    def watch(self, options: Options) -> Watch | None:
        """What looks at the gradients of this step while they are made."""
        return None

    def weigh(self, call: Call, options: Options) -> Balance:
        """The weights of a full pass that follows; only asked for where `one_pass`."""
        raise NotImplementedError

    def solve(self, gathered: Gathered, options: Options) -> Balance:
        """The balance of K gradients."""
        return kernels.solve(gathered.rows, gathered.losses, options, gathered.scale, gathered.ranks)

    def run(self, step: Step, balance: Balance, coefficients: Tensor) -> Balance:
        """Carry out the updates of K gradients.

        Args:
            step: of all parameters.
            balance: what `solve` returned.
            coefficients: [3, K] float64, what multiplies the gradients as they are: the balance's, without their scale.

        Returns:
            The balance as it is known after that.
        """
        return replace(balance, skipped=step.update(coefficients, balance.skipped))

    def release(self) -> None:
        """The passes of a call of `backward` are over: hold nothing that belongs to its graph."""

    def commit(self, names: tuple[str, ...], balance: Balance) -> None:
        """A step is over: remember what the next needs, unless the balance has `skipped`."""

    def state_dict(self) -> dict[str, Any]:
        """What the source remembers: tensors, numbers and names; empty if nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. The state of another kind of source is not used: this one measures anew."""


@dataclass(eq=False)
class Exact(Source):
    """K backward passes, one per objective, and one read of the K gradients in `step`. The default.

    Cost: K - 1 backward passes more than a weighted sum. Weights: exact.
    """


@dataclass(frozen=True)
class Given:
    """A weighting that is already decided.

    Attributes:
        weights: [K].
        log_gradients: whether they multiply log-gradients.
    """

    weights: Tensor
    log_gradients: bool
    needs_gram: ClassVar[bool] = False

    def __call__(self, gram: Tensor, losses: Tensor) -> Tensor:
        """The weights, whatever the Gram matrix."""
        return self.weights
