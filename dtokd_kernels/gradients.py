"""Collecting gradient sets: a backward pass per objective into a set of its own, or one pass of a weighted sum."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import NoneType

import torch
from torch import Tensor

from .checks import check_share
from .ranks import Ranks
from .reach import Reach
from .sources.source import Call, Source, root_gradient
from .sources.unmeasured import Unmeasured
from .types import MAX_OBJECTIVES, Balance, Options
from .watch import Watch
from .weighting.stateful import Stateful

Losses = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

#: Without the reset the flag would silence torch's check, and the passes read what the first one has overwritten.
_DONATED = (
    "the compiled model's backward pass overwrites what it reads, as it was first run for a single loss (here, or in "
    "an earlier run whose compilation was cached), but each objective takes a pass; import torch._functorch.config, "
    "set torch._functorch.config.donated_buffer = False and call torch.compiler.reset()"
)


class GradientSets:
    """Gradients of the same parameters, and the values of the K objectives they belong to.

    There is one set per objective or, where the source of the Gram matrix takes one pass, one for their weighted sum.
    Gradients stay as autograd made them; several calls of `collect` add up, in gradients and in losses, so
    that the gradient of log of the summed loss is right under accumulation.

    Attributes:
        names: the objectives' names, in their order.
        losses: [K] float64, summed over the calls, each times its share; None before the first.
        params: whose gradients they are.
        grads: one list per set, one gradient per parameter; None where the set's objectives do not reach it.
        weighed: the balance that weighed the sum, of the last call; None if each objective has a set.
        shares: the sum of the calls' shares.
        scaler: the GradScaler of the calls; None if there is none, or it is disabled.
        scale: scalar float64, its scale, which the gradients are multiplied with; None without one.
        source: of the Gram matrix, of these gradients.
        used: whether a step has taken these gradients.
        watch: what looked at the gradients while they were made.
        reach: which objectives reach which parameters; it outlasts `clear`.
    """

    def __init__(self, reach: Reach | None = None) -> None:
        self.reach = Reach() if reach is None else reach
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._forget_losses()
        self.params: list[Tensor] = []
        self.grads: list[list[Tensor | None]] = []

    def zero(self) -> None:
        """Forget the losses, but keep the gradients' memory, filled with zeros."""
        self._forget_losses()
        held = [g for row in self.grads for g in row if g is not None]
        if held:
            torch._foreach_zero_(held)

    def overflowed(self, record: Balance, ranks: Ranks | None) -> Tensor:
        """Scalar bool: whether a loss or a gradient is not finite, as a GradScaler asks; the same on all ranks.

        Args:
            record: the balance of the step.
            ranks: the other processes that train the same model; None if there are none.
        """
        assert self.losses is not None
        lost = ~self.losses.isfinite().all()
        if ranks is not None and ranks.shards:  # these are the losses of this rank's samples
            lost = ranks.sum(lost.double()) > 0
        return ~record.norm.isfinite() | lost.to(record.norm.device)

    def align(self, params: Sequence[Tensor]) -> bool:
        """Bring the sets to these parameters: those that are gone are forgotten, new ones have no gradient yet.

        Returns:
            Whether they were others before.
        """
        if len(params) == len(self.params) and all(map(operator.is_, params, self.params)):
            return False
        held = [{id(p): g for p, g in zip(self.params, row, strict=True)} for row in self.grads]
        self.grads = [[row.get(id(p)) for p in params] for row in held]
        self.params = list(params)
        return True

    def _forget_losses(self) -> None:
        self.names: tuple[str, ...] = ()
        self.losses: Tensor | None = None
        self.weighed: Balance | None = None
        self.source: Source = Unmeasured()
        self.shares = 0.0
        self.scaler: torch.amp.GradScaler | None = None
        self.scale: Tensor | None = None
        self.used = False
        self.watch: Watch | None = None

    def collect(
        self,
        losses: Losses,
        params: Sequence[Tensor],
        source: Source,
        options: Options,
        ranks: Ranks | None = None,
        *,
        share: float = 1.0,
        scaler: torch.amp.GradScaler | None = None,
        balanced: Sequence[bool] | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
        retain_graph: bool = False,
        inputs: Sequence[Tensor] | None = None,
        op: str = "backward",
    ) -> None:
        """Run the backward passes and add the gradients to their sets.

        While the pass of a set runs, each parameter's `.grad` is its gradient in that set, so autograd accumulates
        in place and its hooks fire; afterwards `.grad` is what it was. Other parameters than `params` get what
        plain backward calls give them, or, where one pass is taken, that of the weighted sum. Gradients are made times
        `share` and the scaler's scale: both are where the passes start, so the losses stay as they are.

        Args:
            losses: K scalar tensors, by position or by name; a single tensor is one objective.
            params: leaf tensors whose gradients are collected.
            source: of the Gram matrix; decides which passes there are. Their kind stays until the sets are cleared.
            options: of the balance. Losses that are not positive are refused where log-gradients divide by them.
            ranks: the other processes that train the same model; None if there are none.
            share: of this call in the step: its part of the batch.
            scaler: whose scale the gradients are multiplied with; the same in all calls of a step.
            balanced: for each parameter, whether it takes part in the balance; default: all do.
            features: the representation that `sources.Feature` measures at.
            retain_graph: keep the graph after the last pass too.
            inputs: restrict the passes to these leaves, as in `torch.autograd.backward`.
            op: what error messages call this.

        Raises:
            TypeError, ValueError: a bad loss or a sparse gradient; names it and the remedy. Nothing but the
                gradient sets has changed: those are as before for a bad loss and empty after any later failure.

        Effects: losses on the CPU are checked here; those on another device are not read, so that nothing stalls.
        """
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        try:
            check_share(op, share)
            share = float(share)
            if not isinstance(features, (Tensor, Sequence, NoneType)) or isinstance(features, str):
                raise TypeError(
                    f"{op}: features is {features!r}; pass the tensor, or a list of tensors, that the losses were "
                    "computed from"
                )
            names, values = self._checked(losses, options, ranks, op)
            self._check_scaler(scaler, op)
        except (TypeError, ValueError):
            if ranks is not None:
                ranks.refuse()
            raise
        if self.used:
            warnings.warn(
                f"{op}: the gradients of the last step are still there, and new ones are added to them; call "
                "optimizer.zero_grad() after each step (model.zero_grad() does not clear them)",
                stacklevel=3,
            )
            self.used = False
        current = torch.stack([v.detach().reshape(()).to(values[0].device, torch.float64) for v in values])
        started = self.losses is not None
        if not started:
            self.source = Unmeasured() if options.frozen else source
        source = self.source
        one_pass = self.weighed is not None or (not started and source.one_pass(names, params))
        if one_pass and options.log_gradients and options.rescale == "none" and self.shares + share > 1 + 1e-6:
            if ranks is not None:
                ranks.refuse()
            raise ValueError(
                f"{op}: the shares of this step's calls sum to {self.shares + share:g}, but log-gradients do not get "
                "shorter when a loss is divided: the step would be too long; pass share=1/n to each of n calls"
            )
        summed = share * current if self.losses is None else self.losses + share * current
        scale = self.scale
        if scaler is not None and scale is None:
            scale = scaler.scale(torch.ones((), device=values[0].device)).double()
        factor = share if scale is None else share * scale
        if ranks is not None and ranks.agrees_before(one_pass):
            agreed = ranks.agree(current if one_pass else summed, names, 1 if one_pass else len(names), op)
            if one_pass:
                current, summed = agreed, share * agreed if self.losses is None else self.losses + share * agreed
            else:
                summed = agreed
        if one_pass:
            chosen = [features] if isinstance(features, Tensor) else features
            unclipped = replace(options, max_norm=None)  # the sum's norm is known when its gradient is
            try:
                with torch.no_grad():
                    record = source.weigh(Call(op, names, values, current, params, chosen, scale, ranks), unclipped)
            except BaseException:
                self.clear()
                source.release()
                raise
            coefficients = record.coefficients * factor
            roots = [root_gradient(v, c) for c, v in zip(coefficients, values, strict=True)]
            passes: list[tuple[list[Tensor], list[Tensor] | None]] = [(values, roots)]
            if (before := self.weighed) is not None:
                norm = torch.where(before.norm.isfinite(), record.norm, before.norm)
                record = replace(record, skipped=record.skipped | before.skipped, norm=norm)
            weighed, watch = record, None
        else:
            plain = scale is None and share == 1
            passes = [([value], None if plain else [root_gradient(value, factor)]) for value in values]
            weighed, watch = None, self.watch if started else source.watch(options)
        if len(self.grads) != len(passes):
            self.grads = [[None] * len(self.params) for _ in passes]
        self.align(params)
        users = [p.grad for p in params]
        self.reach.begin(names, params)
        try:
            if watch is not None:
                watch.start(self.grads, [True] * len(params) if balanced is None else balanced, self.reach)
            for i, (tensors, starts) in enumerate(passes):
                row = self.grads[i]
                for p, grad in zip(params, row if ranks is None else ranks.start(i, row), strict=True):
                    p.grad = grad
                last = i == len(passes) - 1
                with self._around(i, len(passes), params, watch, ranks):
                    torch.autograd.backward(tensors, starts, retain_graph=retain_graph or not last, inputs=inputs)
                row[:] = [p.grad for p in params] if ranks is None else ranks.result(i, params)
                _check_dense(row, names[i] if weighed is None else "the weighted sum", op)
            if watch is not None:
                with torch.no_grad():
                    watch.finish()
        except BaseException as error:
            self.clear()  # some sets may hold half a pass
            if isinstance(error, RuntimeError) and "donated buffer" in str(error):
                raise RuntimeError(f"{op}: {_DONATED}") from error
            raise
        finally:
            source.release()
            for p, grad in zip(params, users, strict=True):
                p.grad = grad
        self.losses = summed
        self.names, self.weighed, self.watch = names, weighed, watch
        self.scaler, self.scale = scaler, scale
        self.shares += share

    def _checked(
        self, losses: Losses, options: Options, ranks: Ranks | None, op: str
    ) -> tuple[tuple[str, ...], list[Tensor]]:
        names, values = checked_losses(losses, options, ranks, op)
        if self.losses is not None and names != self.names:
            raise ValueError(
                f"{op}: losses are {_listed(names)}, but the gradients gathered so far belong to "
                f"{_listed(self.names)}; call step() and zero_grad() before the objectives change"
            )
        expect(names, options)
        return names, values

    def _check_scaler(self, scaler: torch.amp.GradScaler | None, op: str) -> None:
        if self.losses is not None and scaler is not self.scaler:
            raise ValueError(
                f"{op}: scaler is not that of the calls before; pass the same one, or none, to all calls of a step"
            )

    def _around(
        self, i: int, K: int, params: Sequence[Tensor], watch: Watch | None, ranks: Ranks | None
    ) -> AbstractContextManager[None]:
        """What goes on around pass i of K."""
        if ranks is None:
            return _watched(watch, params, i, K)
        return ranks.passing(i, K, params, self.grads[i], watch if watch and watch.watches(i, K) else None)


@contextmanager
def _watched(watch: Watch | None, params: Sequence[Tensor], i: int, K: int) -> Iterator[None]:
    """Have pass i of K watched: hooks for this pass alone, so that none stays behind."""
    if watch is None or not watch.watches(i, K):
        yield
        return

    def hook(t: int, ready: Callable[[int, int, Tensor], None]) -> Callable[[Tensor], None]:
        def written(p: Tensor) -> None:
            # a function of the user's may have made none; a sparse one is refused after the pass
            if p.grad is not None and p.grad.layout is torch.strided:
                with torch.no_grad():
                    ready(i, t, p.grad)

        return written

    handles = [
        p.register_post_accumulate_grad_hook(hook(t, watch.ready)) for t, p in enumerate(params) if p.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def named_losses(
    losses: Losses, op: str, most: int = MAX_OBJECTIVES, graph: bool = True
) -> tuple[tuple[str, ...], list[Tensor]]:
    """The objectives' names ("0", "1", ... for a sequence) and tensors: scalars, that need a gradient if `graph`.

    Raises:
        TypeError: `losses` is neither a mapping nor a sequence of tensors.
        ValueError: it is empty, has more than `most` objectives, or two keys with the same name, as 1 and "1" are; or
            see `check_loss`.
    """
    if isinstance(losses, Tensor) and losses.dim() == 0:
        losses = [losses]
    if isinstance(losses, Mapping):
        names, values = tuple(map(str, losses.keys())), list(losses.values())
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            keys = " and ".join(repr(key) for key in losses if str(key) == twice)
            raise ValueError(
                f"{op}: losses has two objectives named {twice!r}, of the keys {keys}; give each a name of its own"
            )
    elif isinstance(losses, (Sequence, Tensor)) and not isinstance(losses, str):
        values = list(losses)
        names = tuple(map(str, range(len(values))))
    else:
        raise TypeError(
            f"{op}: losses is a {type(losses).__name__}; pass a list of scalar tensors, or a dict from names to them"
        )
    if not values:
        raise ValueError(f"{op}: losses is empty; pass at least one scalar tensor")
    for name, value in zip(names, values, strict=True):
        check_loss(f"losses[{name!r}]", value, op, graph)
    if len(values) > most:
        raise ValueError(f"{op}: losses has {len(values)} objectives, at most {most} are supported; add some up")
    return names, values


def checked_losses(
    losses: Losses, options: Options, ranks: Ranks | None, op: str
) -> tuple[tuple[str, ...], list[Tensor]]:
    """As `named_losses`, and positive where log-gradients divide by them; over ranks what counts is their mean.

    Raises:
        TypeError, ValueError: names the loss, and the remedy.
    """
    names, values = named_losses(losses, op)
    if ranks is None and options.log_gradients:
        for name, value in zip(names, values, strict=True):
            _check_positive(name, value, op)
    return names, values


def expect(names: tuple[str, ...], options: Options) -> None:
    """Give a weighting that remembers the names of the objectives whose losses come next.

    Raises:
        ValueError: they are not those that it remembers.
    """
    if isinstance(options.weighting, Stateful):
        options.weighting.expect(names)


def gradients_of(values: Sequence[Tensor], params: Sequence[Tensor], op: str) -> list[tuple[Tensor | None, ...]]:
    """The gradients of several losses, one row each with None where a loss does not reach a parameter; graphs stay.

    Raises:
        TypeError: the parameters are sharded.
    """
    if any(type(p).__name__ == "DTensor" for p in params):
        raise TypeError(
            f"{op}: the parameters are sharded (DTensor), which is not supported; pass those of an unsharded model"
        )
    return [torch.autograd.grad(v, params, torch.ones_like(v), retain_graph=True, allow_unused=True) for v in values]


def check_loss(what: str, loss: Tensor, op: str, graph: bool = True) -> None:
    """Refuse what is no scalar, or, if `graph`, needs no gradient.

    Raises:
        TypeError, ValueError: names `what` it is, and the remedy.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"{op}: {what} is a {type(loss).__name__}; pass the loss tensor itself, before .item()")
    if loss.numel() != 1:
        raise ValueError(
            f"{op}: {what} has shape {tuple(loss.shape)}, expected a scalar; reduce it with .mean() or .sum()"
        )
    if loss.is_complex():
        raise ValueError(f"{op}: {what} is complex; take its real part or its absolute value")
    if graph and not loss.requires_grad:
        raise ValueError(
            f"{op}: {what} needs no gradient; compute it from the parameters, outside no_grad, without detach()"
        )


def _check_positive(name: str, loss: Tensor, op: str) -> None:
    """On the CPU; elsewhere, and where the loss is not finite, the step is skipped."""
    if loss.device.type != "cpu":
        return
    value = loss.item()
    if math.isfinite(value) and value <= 0:
        raise ValueError(
            f"{op}: losses[{name!r}] is {value}, but log-gradients need a positive loss; shift the loss by its lower "
            "bound, pass loss.clamp(min=1e-7) if that is 0 (once there it has no gradient and is left out of the "
            "step), or weigh raw gradients with weighting=DTO(log_gradients=False)"
        )


def _check_dense(grads: Sequence[Tensor | None], name: str, op: str) -> None:
    for index, gradient in enumerate(grads):
        if gradient is not None and gradient.layout is not torch.strided:
            raise ValueError(
                f"{op}: the gradient of objective {name!r} for parameter {index} {tuple(gradient.shape)} is sparse, "
                "which is not supported; build the embedding with sparse=False"
            )


def _listed(names: Sequence[str]) -> str:
    return "[" + ", ".join(names) + "]"
