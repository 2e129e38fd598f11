"""Whole parameters, but a share of the gradients and of the optimizer's state on each rank (ZeRO-2).

Each objective's gradients are reduce-scattered in buckets during its pass; Gram matrices are summed over ranks; each
rank updates its share of every parameter, and the parameters are gathered. Sent are K + 1 units of (n - 1) / n times
the parameters' bytes, where averaging K gradients on all ranks takes 2 K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from ..sources import Lag
from ..sources.source import Source
from ..sources.wrapper import innermost
from ..watch import Watch
from .flat import ALIGNED, up
from .replicas import BUCKET_BYTES, Pass, Replicas, Slot, Waits, check_dense, write_flags

#: torch 2.14 has other names for them
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Sharded(Replicas):
    """Ranks with all parameters and the r-th part of each one's gradients and state.

    A parameter's numbers are cut in rows of 8, the last filled up with zeros, and the rows in chunks as `torch.chunk`
    cuts them; its part is chunk r. So each part begins at a place that GPU kernels read 16 bytes at a time, and the
    state is a DTensor [rows, 8] that `torch.distributed.checkpoint` saves on n ranks and loads on m.
    """

    shards = True

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        modules: Sequence[DistributedDataParallel] = (),
        *,
        op: str,
        device: str = "cpu",
        bucket_bytes: int = BUCKET_BYTES,
        static_graph: bool = False,
    ) -> None:
        super().__init__(group, modules, op=op, bucket_bytes=bucket_bytes, static_graph=static_graph)
        self._rank = dist.get_rank(group)
        whole = group if group is not None else dist.group.WORLD
        assert whole is not None
        self._mesh = DeviceMesh.from_group(whole, device)
        # gloo scatters a sum by reducing everything everywhere, and gathers slowly: send the parts, and add there
        self._adds = dist.get_backend(group) == "gloo"
        self._gathered: dict[tuple[int, ...], list[Slot]] = {}
        self._updated: list[Tensor] = []
        self._pool: list[Tensor] = []
        self._sent: list[Tensor] = []  # buckets of this pass
        self._whole: set[int] = set()  # passes whose gradients are this rank's, of whole parameters
        self._begun: set[int] = set()  # passes since the sets were cleared
        self._earlier: list[Tensor | None] = []
        self._parts: list[Tensor | None] = []

    def check(self, source: Source, op: str) -> None:
        """Refuse what decides before the Gram matrices of all ranks are known.

        Raises:
            ValueError: it is "lag".
        """
        if isinstance(innermost(source), Lag):
            raise ValueError(f"{op}: gram='lag' does not go with shard=True; use 'overlap', or shard=False")

    def cleared(self) -> None:
        """The gradient sets hold nothing, or zeros."""
        super().cleared()
        self._begun.clear()

    def start(self, i: int, row: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Whole gradients of earlier parts of the batch; reduced ones are kept, as they do not fit in `.grad`."""
        begun = i in self._begun
        self._begun.add(i)
        if i in self._whole or all(g is None for g in row):
            self._earlier = [None] * len(row)
            return list(row)
        if not self.syncs and not begun:  # parts of zeros, which whole gradients take the place of
            self._earlier = [None] * len(row)
            return self._earlier
        if not self.syncs:
            raise RuntimeError(
                f"{self.op}: inside no_sync() after a part of the batch that was reduced; with shard=True enter it for "
                "all parts but the last"
            )
        self._earlier = list(row)
        return [None] * len(row)

    def result(self, i: int, params: Sequence[Tensor]) -> list[Tensor | None]:
        """This rank's parts; whole gradients after a pass inside no_sync()."""
        if self.unsynced:
            self._whole.add(i)
            return [p.grad for p in params]
        self._whole.discard(i)
        return self._parts

    def _launch(self, running: Pass) -> None:
        """Reduce and scatter the next slot; the whole gradients are given up."""
        slot = running.slots[len(running.launched)]
        members = [running.params[t] for t in slot.positions]
        width = sum(self._cut_of(p.numel())[0] for p in members)
        flat = self._lend(members[0], width + len(members))
        start = 0
        for p in members:
            chunk = self._cut_of(p.numel())[0]
            if p.grad is None:
                flat[:, start : start + chunk] = 0
            else:
                check_dense(p, self.op)
                if not self._adds:
                    p.grad.div_(self.size)
                _scatter(flat, start, chunk, p.grad.reshape(-1))
            start += chunk
        write_flags(flat[0, width:], [p.grad is not None for p in members])
        flat[1:, width:] = flat[0, width:]
        for p in members:
            p.grad = None
        if self._adds:
            out = self._lend(members[0], width + len(members))
            work: Waits = self._exchange_rows(flat, out, len(running.launched))
            out[self._rank] = flat[self._rank]
        else:
            out = slot.memory(flat, width + len(members))
            work = _reduce_scatter(out, flat.view(-1), group=self.group, async_op=True)
        self._sent.append(flat)
        running.launched.append((out, work))

    def _unpack(self, running: Pass, i: int, watch: Watch | None) -> list[int]:
        """Wait for the slots, one after the other. Returns what somebody reached."""
        used: list[int] = []
        self._parts = list(self._earlier)
        for b, (slot, (out, work)) in enumerate(zip(running.slots, running.launched, strict=True)):
            work.wait()
            sums = out
            if self._adds:
                again = any(self._earlier[t] is not None for t in slot.positions)
                sums = out.new_empty(out.shape[1]) if again else slot.memory(out, out.shape[1])
                torch.div(out[0], self.size, out=sums)
                for row in out[1:]:
                    sums.add_(row, alpha=1 / self.size)
                self._pool.append(out)
            start = 0
            for t, flag in zip(slot.positions, self._flags(running, b, sums), strict=True):
                chunk, begin, end = self._cut_of(running.params[t].numel())
                if flag:
                    used.append(t)
                    part, earlier = sums[start : start + end - begin], self._earlier[t]
                    self._parts[t] = part = part if earlier is None else part.add_(earlier)
                    if watch is not None:
                        watch.ready(i, t, part)
                start += chunk
        self._pool += self._sent if self._adds else []
        self._sent = []
        return used

    def _exchange_rows(self, rows: Tensor, out: Tensor, tag: int) -> Waits:
        """Send row r to rank r, and write what comes from rank r to row r."""
        works: list[Any] = []
        for step in range(1, self.size):
            to, source = (self._rank + step) % self.size, (self._rank - step) % self.size
            works.append(dist.isend(rows[to], group=self.group, group_dst=to, tag=tag))
            works.append(dist.irecv(out[source], group=self.group, group_src=source, tag=tag))
        return _All(works)

    def _lend(self, like: Tensor, width: int) -> Tensor:
        """Room for one row per rank; on the CPU what was used before, as the first touch of a page is slow."""
        for i, held in enumerate(self._pool):
            if held.shape[1] == width and held.dtype == like.dtype:
                return self._pool.pop(i)
        return like.detach().new_empty((self.size, width))

    def zeros(self, p: Tensor, dtype: torch.dtype | None) -> Tensor:
        """A moment's start: this rank's part of [rows, 8] numbers."""
        return self._whole_of(p.detach().new_zeros(0, dtype=dtype or p.dtype), p)

    def master(self, p: Tensor) -> Tensor:
        """A float32 copy of this rank's part of a parameter."""
        return self._whole_of(self._part_of(p).to(torch.float32, copy=True), p)

    def part(self, whole: Tensor, p: Tensor) -> Tensor:
        """This rank's part of a moment that was loaded whole; one that was loaded in parts stays."""
        if isinstance(whole, DTensor):
            return whole
        _, begin, end = self._cut_of(p.numel())
        return self._whole_of(whole.reshape(-1)[begin:end], p)

    def shape_of(self, p: Tensor) -> torch.Size:
        """The shape that a moment has here, and in a checkpoint of all ranks."""
        return torch.Size([up(p.numel()) // ALIGNED, ALIGNED])

    def _whole_of(self, part: Tensor, p: Tensor) -> Tensor:
        """A moment of which this rank has a part; what the part lacks is zeros."""
        shape = self.shape_of(p)
        _, begin, end = self._cut_of(shape.numel())
        local = part.new_zeros(end - begin)
        local[: len(part)] = part
        local = local.view(-1, ALIGNED)
        return DTensor.from_local(local, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=(ALIGNED, 1))

    def _numbers(self, value: Tensor, p: Tensor) -> Tensor:
        """Of a parameter's state, those that belong to this rank's part."""
        if not isinstance(value, DTensor):
            return value
        _, begin, end = self._cut_of(p.numel())
        return value.to_local().view(-1)[: end - begin]

    def _part_of(self, p: Tensor) -> Tensor:
        _, begin, end = self._cut_of(p.numel())
        return p.detach().view(-1)[begin:end]

    def local_rows(
        self, params: list[Tensor], states: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """This rank's parts of parameters and state."""
        self._updated = list(params)
        local = [
            {name: self._numbers(value, p) for name, value in state.items()}
            for p, state in zip(params, states, strict=True)
        ]
        return [self._part_of(p) for p in params], local

    def after_updates(self) -> None:
        """Gather the parameters that were updated, of which each rank has a part."""
        params, self._updated = self._updated, []
        key = tuple(map(id, params))
        if key not in self._gathered:
            self._gathered = {key: self._cut(range(len(params)), params, early=True)}
        running = []
        for tag, slot in enumerate(self._gathered[key]):
            members = [params[t] for t in slot.positions]
            width = sum(self._cut_of(p.numel())[0] for p in members)
            flat = self._lend(members[0], width)
            own, start = flat[self._rank], 0
            for p in members:
                chunk, begin, end = self._cut_of(p.numel())
                own[start : start + end - begin] = self._part_of(p)
                own[start + end - begin : start + chunk] = 0
                start += chunk
            if self._adds:
                work: Waits = self._exchange_rows(own.expand(self.size, -1), flat, tag)
            else:
                work = _all_gather(flat.view(-1), own.clone(), group=self.group, async_op=True)
            running.append((members, flat, work))
        for members, flat, work in running:
            work.wait()
            start = 0
            for p in members:
                chunk = self._cut_of(p.numel())[0]
                _gather(flat, start, chunk, p.detach().view(-1))
                start += chunk
            if self._adds:
                self._pool.append(flat)

    def _cut_of(self, n: int) -> tuple[int, int, int]:
        """Length of a chunk of n numbers, in whole rows, and begin and end of this rank's."""
        chunk = -(-up(n) // ALIGNED // self.size) * ALIGNED
        return chunk, min(self._rank * chunk, n), min((self._rank + 1) * chunk, n)


class _All:
    """Several communications as one."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def _scatter(flat: Tensor, start: int, chunk: int, values: Tensor) -> None:
    """Write chunk r of the values to row r, from column `start`; zeros where there is nothing left."""
    if not chunk:  # an empty parameter
        return
    full, rest = divmod(len(values), chunk)
    columns = flat[:, start : start + chunk]
    columns[:full] = values[: full * chunk].view(full, chunk)
    if full < len(flat):
        columns[full, :rest] = values[full * chunk :]
        columns[full, rest:] = 0
        columns[full + 1 :] = 0


def _gather(flat: Tensor, start: int, chunk: int, values: Tensor) -> None:
    """Read what `_scatter` writes."""
    if not chunk:
        return
    full, rest = divmod(len(values), chunk)
    columns = flat[:, start : start + chunk]
    values[: full * chunk].view(full, chunk).copy_(columns[:full])
    if rest:
        values[full * chunk :] = columns[full, :rest]
