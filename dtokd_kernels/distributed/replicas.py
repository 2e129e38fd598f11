"""DistributedDataParallel: every rank holds all parameters, and each objective's gradients are averaged in buckets."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..ranks import Ranks
from ..watch import Watch
from .flat import Flat

#: As DistributedDataParallel's: large enough for bandwidth, small enough to start while the pass goes on.
BUCKET_BYTES = 25 << 20


@dataclass(eq=False)
class Slot:
    """Parameters whose gradients share one all-reduce: of one dtype and device.

    The flat tensor holds their gradients, as `Flat` places them, and then one number each: whether a rank reached it.
    """

    positions: tuple[int, ...]
    early: bool  #: whether it is reduced as soon as all its gradients are there, not after the pass
    kept: Tensor | None = None  #: the flat tensor, where fresh memory would cost more than copying to it

    def memory(self, like: Tensor, *shape: int) -> Tensor:
        """Room for what is reduced: the same in each step on the CPU, where the first touch of a page is slow."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        if self.kept is None:
            self.kept = like.new_empty(shape)
        return self.kept


#: Pass, number of passes, and the parameters that require a gradient.
_Key = tuple[int, int, tuple[int, ...]]


class Waits(Protocol):
    """What a communication that was started returns."""

    def wait(self) -> object:
        """Until it is done; on CUDA the stream waits, not the host."""


class Pass:
    """What is going on in one backward pass."""

    def __init__(
        self, params: Sequence[Tensor], slots: list[Slot], syncs: bool, reached: frozenset[int] | None
    ) -> None:
        self.params, self.slots, self.syncs, self.reached = params, slots, syncs, reached
        self.position = {id(p): t for t, p in enumerate(params)}
        self.slot_of = {t: b for b, slot in enumerate(slots) for t in slot.positions}
        self.waiting = [len(slot.positions) for slot in slots]
        self.seen: set[int] = set()
        self.launched: list[tuple[Tensor, Waits]] = []
        self.flags: list[list[float]] = []  # of each slot, once they have been read from a GPU


class Replicas(Ranks):
    """Ranks with a copy of all parameters each.

    While pass i runs, a hook on each parameter counts what is there, and a bucket is reduced as soon as it is
    complete and those before it are on their way; the rest follows after the pass. So all ranks reduce the same
    buckets in the same order, whatever each has reached. A gradient that another rank has and this one has not counts
    as zeros; one that no rank has stays None. Which those are travels with the gradients.

    The first step learns what each objective reaches (a head, a projector): what it does not comes last from then on,
    so that no bucket waits for it.

    Attributes:
        hooked: the parameters whose gradients it sees, by their ids, with what lets go of each.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        modules: Sequence[DistributedDataParallel] = (),
        *,
        op: str,
        bucket_bytes: int = BUCKET_BYTES,
        static_graph: bool = False,
        each_part: bool = False,
    ) -> None:
        super().__init__(group, op, each_part)
        # weakly: torch's garbage collector does not see the module's hold on its parameters, which hold their hooks
        self._modules = tuple(map(weakref.ref, modules))
        self._bucket_bytes = bucket_bytes
        self._static = static_graph
        self._slots: dict[_Key, list[Slot]] = {}
        self._reached: dict[_Key, frozenset[int]] = {}
        self._running: Pass | None = None
        self.hooked: dict[int, tuple[Tensor, RemovableHandle]] = {}
        self._params: list[Tensor] = []  # that the positions in slots and reach count

    @property
    def modules(self) -> list[DistributedDataParallel]:
        """The models that are wrapped, as far as they are still there."""
        return [module for held in self._modules if (module := held()) is not None]

    @property
    def syncs(self) -> bool:
        """Whether the next backward passes reduce gradients; see `Ranks`. A module's `no_sync` counts as ours."""
        if self.each_part:
            return True
        open_ = [module.require_backward_grad_sync for module in self.modules]
        if any(open_) and not all(open_):
            raise RuntimeError(
                f"{self.op}: some of the attached modules are inside no_sync() and some are not; enter it for all"
            )
        return super().syncs and all(open_)

    @contextmanager
    def passing(
        self, i: int, K: int, params: Sequence[Tensor], row: Sequence[Tensor | None], watch: Watch | None
    ) -> Iterator[None]:
        """Reduce the gradients that the backward pass inside writes."""
        leaves = tuple(t for t, p in enumerate(params) if p.requires_grad)
        self._number(params)
        self.hook(params)
        key = (i, K, leaves)
        slots = self._slots_of(key, params)
        self._running = running = Pass(params, slots, self.syncs, self._reached.get(key))
        try:
            yield
        finally:
            self._running = None
        self.unsynced = not running.syncs
        if self.unsynced:
            return
        with torch.no_grad():
            while len(running.launched) < len(slots):
                self._launch(running)
            used = self._unpack(running, i, watch)
        if key not in self._reached:
            self._reached[key] = frozenset(used)
            del self._slots[key]  # made anew, with what this pass does not reach at the end

    def state_dict(self) -> dict[str, Any]:
        """What was learned of who reaches what, and so the order in which gradients are added up.

        Where three ranks or more go on from a checkpoint with it, they repeat the bits of those that were not stopped.
        """
        return {"reached": [[i, K, list(leaves), sorted(to)] for (i, K, leaves), to in self._reached.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`, on any number of ranks."""
        self._reached = {(i, K, tuple(leaves)): frozenset(to) for i, K, leaves, to in state["reached"]}
        self._slots = {}

    def adopt(self, params: Sequence[Tensor]) -> None:
        """Those outside of the modules become those of rank 0; the gradients of all are seen from here on."""
        for p in outside(params, self.modules):
            dist.broadcast(p.detach(), group_src=0, group=self.group)
        self.hook(params)

    def hook(self, params: Sequence[Tensor]) -> None:
        """Be told of each gradient that autograd writes, in passes of `optimizer.backward` and outside of them."""
        for p in params:
            if p.requires_grad and id(p) not in self.hooked:
                self.hooked[id(p)] = p, p.register_post_accumulate_grad_hook(self._written)

    def unhook(self) -> None:
        """Let go of the parameters: other ranks take their place."""
        for _, handle in self.hooked.values():
            handle.remove()
        self.hooked = {}

    def missing(self, params: Sequence[Tensor]) -> Tensor | None:
        """A trained parameter that is not among these, so that nobody would average its gradient."""
        known = set(map(id, params))
        return next((p for i, (p, _) in self.hooked.items() if i not in known and p.requires_grad), None)

    def _number(self, params: Sequence[Tensor]) -> None:
        """Learn anew what is reached, if the optimizer's groups have changed, as positions mean others then."""
        if len(params) == len(self._params) and all(map(operator.is_, params, self._params)):
            return
        if self._params:
            self._slots, self._reached = {}, {}
        self._params = list(params)

    def _slots_of(self, key: _Key, params: Sequence[Tensor]) -> list[Slot]:
        if key not in self._slots:
            leaves, reached = key[2], self._reached.get(key)
            backwards = leaves[::-1]  # about the order in which gradients come
            first = [t for t in backwards if reached is None or t in reached]
            rest = [] if self._static or reached is None else [t for t in backwards if t not in reached]
            parts = self._cut(first, params, early=True) + self._cut(rest, params, early=False)
            self._slots[key] = parts
        return self._slots[key]

    def _cut(self, positions: Sequence[int], params: Sequence[Tensor], early: bool) -> list[Slot]:
        """Slots of at most so many bytes, but for a parameter that is larger."""
        slots: list[Slot] = []
        filling: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for t in positions:
            members = filling.setdefault((params[t].dtype, params[t].device), [])
            size = sum(params[m].numel() for m in [*members, t]) * params[t].element_size()
            if members and size > self._bucket_bytes:
                slots.append(Slot(tuple(members), early))
                members.clear()
            members.append(t)
        slots += [Slot(tuple(members), early) for members in filling.values()]
        return slots

    def _written(self, p: Tensor) -> None:
        """Autograd has written the gradient of a parameter."""
        running = self._running
        if running is None:
            call = "dtokd_kernels.backward(losses, params)" if self.each_part else "optimizer.backward(losses)"
            raise RuntimeError(
                "loss.backward() reached a parameter that is attached to several ranks: nobody would average this "
                f"gradient; call {call}, with one loss if there is one"
            )
        t = running.position.get(id(p))
        if t is None:  # the optimizer has it no longer
            return
        if not running.syncs or p.grad is None or p.grad.layout is not torch.strided:  # a sparse one is refused below
            return
        b = running.slot_of.get(t)
        if t in running.seen:
            if b is not None and b < len(running.launched):
                raise RuntimeError(
                    f"{self.op}: parameter {t} {tuple(p.shape)} got a second part of its gradient after the first was "
                    "reduced; use checkpoint(..., use_reentrant=False)"
                )
            return
        running.seen.add(t)
        if b is None:
            raise RuntimeError(
                f"{self.op}: an objective reached parameter {t} {tuple(p.shape)} for the first time, but the optimizer "
                "was attached with static_graph=True; attach it with static_graph=False"
            )
        running.waiting[b] -= 1
        with torch.no_grad():
            while (b := len(running.launched)) < len(running.slots):
                if running.waiting[b] or not running.slots[b].early:
                    break
                self._launch(running)

    def _launch(self, running: Pass) -> None:
        """Reduce the next slot."""
        slot = running.slots[len(running.launched)]
        members = [running.params[t] for t in slot.positions]
        places = Flat.of(members)
        flat = slot.memory(members[0].detach(), places.size + len(members))
        places.clear_gaps(flat)
        for p, view in zip(members, places.views(flat), strict=True):
            if p.grad is None:
                view.zero_()
            else:
                check_dense(p, self.op)
                torch.div(p.grad, self.size, out=view)  # before the sum, which float16 might not hold
        write_flags(flat[places.size :], [p.grad is not None for p in members])
        running.launched.append((flat, dist.all_reduce(flat, group=self.group, async_op=True)))

    def _unpack(self, running: Pass, i: int, watch: Watch | None) -> list[int]:
        """Wait for the slots, one after the other, and let `.grad` be what came. Returns what somebody reached."""
        used: list[int] = []
        for b, (slot, (flat, work)) in enumerate(zip(running.slots, running.launched, strict=True)):
            work.wait()
            members = [running.params[t] for t in slot.positions]
            flags = self._flags(running, b, flat)
            for t, p, view, flag in zip(slot.positions, members, Flat.of(members).views(flat), flags, strict=True):
                p.grad = view if flag else None
                if flag:
                    used.append(t)
                    if watch is not None:
                        watch.ready(i, t, view)
        return used

    def _flags(self, running: Pass, b: int, flat: Tensor) -> list[float]:
        """How many ranks reached each parameter of slot b, whose reduced flat tensor is there.

        The host waits for a GPU once in a pass, for all slots; with a static graph, in its first step alone.
        """
        if self._static and running.reached is not None:
            return [1.0] * len(running.slots[b].positions)
        if flat.device.type == "cpu":
            return read(_tail(running.slots[b], flat))
        if not running.flags:
            for _, work in running.launched:
                work.wait()
            pairs = zip(running.slots, running.launched, strict=True)
            tails = [_tail(slot, reduced).to(flat.device, torch.float32) for slot, (reduced, _) in pairs]
            counts, values = [len(tail) for tail in tails], read(torch.cat(tails))
            ends = list(itertools.accumulate(counts))
            running.flags = [values[end - count : end] for count, end in zip(counts, ends, strict=True)]
        return running.flags[b]

    def average(self, rows: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor | None]]:
        """Gradients from `torch.autograd.grad`, averaged."""
        return average(rows, self.group)


def outside(params: Sequence[Tensor], modules: Sequence[DistributedDataParallel]) -> list[Tensor]:
    """Those of the parameters that belong to none of the modules."""
    wrapped = {id(p) for module in modules for p in module.module.parameters()}
    return [p for p in params if id(p) not in wrapped]


def average(rows: Sequence[Sequence[Tensor | None]], group: dist.ProcessGroup | None) -> list[list[Tensor | None]]:
    """Gradients from `torch.autograd.grad`, averaged over the ranks: one all-reduce per dtype and device.

    What is None must be None on all ranks.
    """
    size = dist.get_world_size(group)
    result: list[list[Tensor | None]] = [list(row) for row in rows]
    kinds: dict[tuple[torch.dtype, torch.device], list[tuple[int, int]]] = {}
    for i, row in enumerate(rows):
        for t, g in enumerate(row):
            if g is not None:
                kinds.setdefault((g.dtype, g.device), []).append((i, t))
    for where in kinds.values():
        found = [g for g in (rows[i][t] for i, t in where) if g is not None]
        places = Flat.of([torch.empty(g.shape, device="meta") for g in found])  # ranks may differ in strides
        flat = found[0].new_zeros(places.size)
        for g, view in zip(found, places.views(flat), strict=True):
            torch.div(g, size, out=view)
        dist.all_reduce(flat, group=group)
        for (i, t), view in zip(where, places.views(flat), strict=True):
            result[i][t] = view
    return result


def read(flags: Tensor) -> list[float]:
    """Flags on the host: the one place where a pass may wait for the device."""
    values: list[float] = flags.tolist()
    return values


def write_flags(flags: Tensor, present: Sequence[bool]) -> None:
    """1 where a gradient is there and 0 elsewhere, made on the device: a copy of the host's numbers would wait."""
    flags.fill_(1)
    for begin, end in _runs([not there for there in present]):
        flags[begin:end].zero_()


def _runs(chosen: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Begin and end of each stretch of chosen places."""
    place = 0
    for value, members in itertools.groupby(chosen):
        count = len(list(members))
        if value:
            yield place, place + count
        place += count


def _tail(slot: Slot, flat: Tensor) -> Tensor:
    """The flags of a slot's flat tensor."""
    return flat[len(flat) - len(slot.positions) :]


def check_dense(p: Tensor, op: str) -> None:
    """Refuse a sparse gradient.

    Raises:
        ValueError: it is one.
    """
    if p.grad is not None and p.grad.layout is not torch.strided:
        raise ValueError(
            f"{op}: the gradient of a parameter {tuple(p.shape)} is sparse, which is not supported; build the "
            "embedding with sparse=False"
        )
