"""How one launch finds all tensors of a call: the pointer table, where it is made and where kernels read it.

Elements are cut into chunks of `CHUNK`, tensor after tensor, so the partition depends on sizes only; program i of a
launch works on chunk i. A table is int64 [3 + rows, T], for T tensors at each of `rows` addresses (gradients,
parameters, states):

    row 0       the tensor's first chunk, ascending: a program finds its tensor by bisection
    row 1       elements
    row 2       1 if every address is a multiple of 16 bytes: whole chunks take the path of 16-byte accesses
    row 3 + r   addresses
    last row    the tensor's parameter group, in tables of updates

Bisecting T = 155 tensors takes 8 loads that hit the cache after an SM's first program; a map from chunks to tensors
would be one load from memory, and a table as long as the gradients.

Loops over a program's elements are `while` loops: a `range` whose end is a tensor fails in the interpreter of triton
3.6 with numpy >= 2.4, and compiles to the same code.

NOTE [Tables and streams]: a table is a pure function of sizes and addresses, so a cached one is never stale. Addresses
that were not met before (new gradients; the caching allocator soon repeats itself) cost one asynchronous copy.
- The copy's source is pinned memory that is written once, before the copy. Nobody here writes it again: freed, it goes
  back to torch's pinned allocator, which waits for the copy's event before it hands the memory out.
- A table belongs to the stream that it was made on: the stream is part of its key. So the copy is done before a kernel
  reads the table, and memory of a dropped table is used again only after the kernels that read it.
- A stream that captures a CUDA graph copies nothing from the host: a replay would read host memory later. It takes the
  table of these contents that an eager step, the warm-up before every capture, has made on any stream. That table is
  then kept for good, as each replay reads it, and nobody says when a graph is gone. Tables are never rewritten.
  The copy to it is done before a replay, if replays keep an order that they need anyway: the eager launch that read the
  table came after the copy, on the same stream, and it, or the update of the same step, wrote to tensors that the graph
  writes to as well. So numbers of groups are kept together with a tensor that their launch writes to: equal ones of
  another optimizer, on another stream, may still be on their way. A call that only reads, as `gram` does, has the
  synchronization with which `torch.cuda.graph` begins. (A capture may not query events of the world outside.)
- What no eager step has made, such as tables of gradients that lie in the graph's own memory, comes as arguments of
  torch's foreach kernels, which fill a table in the graph's memory: about one more launch per 96 numbers, in the
  capture and in each replay. It is not cached: the graph's memory goes with the graph.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment, var-annotated"

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements of a chunk. Fixed: sums are taken per chunk, so the partition decides the bits.
CHUNK = 8192
#: A thread's share of one load. Fixed for the Gram matrix, whose sums run over lanes of this size.
VECTOR_BYTES = 16
#: Whether kernels run in Triton's interpreter: read when triton makes them, hence once.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True, eq=False)
class Table:
    """A pointer table on the device of its tensors."""

    numbers: Tensor  # [3 + rows, T] int64
    tensors: int
    chunks: int


class _Contents(NamedTuple):
    """What the numbers of a table follow from."""

    device: torch.device
    sizes: tuple[int, ...]
    addresses: tuple[int, ...]
    scalars: tuple[int, ...]
    groups: tuple[int, ...]


#: What eager steps have made and the caches below still hold, by its contents.
_made: WeakValueDictionary[Hashable, Table | Tensor] = WeakValueDictionary()
#: What captured graphs read of it.
_captured: dict[Hashable, Table | Tensor] = {}


def table_of(lists: Sequence[Sequence[Tensor]], scalars: Sequence[Tensor] = (), groups: tuple[int, ...] = ()) -> Table:
    """The table of lists of T tensors of equal sizes, position by position; see NOTE [Tables and streams].

    Args:
        lists: rows of T tensors each, on the current device.
        scalars: one more row, of tensors whose alignment does not matter.
        groups: the last row, if there are some.
    """
    contents = _Contents(
        lists[0][0].device,
        tuple([t.numel() for t in lists[0]]),
        tuple([t.data_ptr() for row in lists for t in row]),
        tuple([t.data_ptr() for t in scalars]),
        groups,
    )
    stream = _stream(contents.device)
    if stream is not None:
        return _table(stream, contents)
    made = _made_before(contents)
    if isinstance(made, Table):
        return made
    return _tabulated(fill_without_host_memory(_numbers(contents), contents.device), contents)


def numbers_of(values: tuple[float, ...], written: Sequence[Tensor]) -> Tensor:
    """Numbers on the device, float64: kept and copied as tables are.

    Args:
        values: the numbers.
        written: tensors that the launch writes to which reads them.
    """
    device = written[0].device
    address = next((t.data_ptr() for t in written if t.numel()), 0)
    stream = _stream(device)
    if stream is not None:
        return _copied(stream, device, values, address)
    made = _made_before((device, values, address))
    return made if isinstance(made, Tensor) else fill_without_host_memory(values, device, torch.float64)


def _stream(device: torch.device) -> int | None:
    """The current stream, 0 on the CPU; None while it captures a graph."""
    if device.type != "cuda":
        return 0
    return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream().cuda_stream


def _made_before(contents: Hashable) -> Table | Tensor | None:
    """What an eager step has made of these contents, if it is still there: from now on for good."""
    made = _captured.get(contents, _made.get(contents))
    if made is not None:
        _captured[contents] = made
    return made


@lru_cache(maxsize=64)
def _copied(stream: int, device: torch.device, values: tuple[float, ...], written: int) -> Tensor:
    numbers = _made[device, values, written] = _copy(values, torch.float64, device)
    return numbers


@lru_cache(maxsize=64)
def _table(stream: int, contents: _Contents) -> Table:
    table = _made[contents] = _tabulated(_copy(_numbers(contents), torch.int64, contents.device), contents)
    return table


def _copy(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    # on the CPU whatever the default device is: a copy from pageable memory would wait
    return torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=device.type == "cuda").to(
        device, non_blocking=True
    )


def _numbers(contents: _Contents) -> list[int]:
    """The table's numbers, row by row."""
    _, sizes, addresses, scalars, groups = contents
    T = len(sizes)
    starts, chunks = [], 0
    for size in sizes:
        starts.append(chunks)
        chunks += _chunks(size)
    aligned = [int(all(address % VECTOR_BYTES == 0 for address in addresses[t::T])) for t in range(T)]
    return [*starts, *sizes, *aligned, *addresses, *scalars, *groups]


def _tabulated(numbers: Tensor, contents: _Contents) -> Table:
    T = len(contents.sizes)
    return Table(numbers.view(-1, T), T, sum(map(_chunks, contents.sizes)))


def _chunks(size: int) -> int:
    return -(-size // CHUNK)


def fill_without_host_memory(
    numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """A tensor of these numbers that a CUDA graph may hold: they travel as arguments of kernels."""
    filled = torch.zeros(len(numbers), dtype=dtype, device=device)
    torch._foreach_add_(list(filled.unbind()), list(numbers))
    return filled


@triton.jit
def find(table, T, chunk, CHUNK: tl.constexpr):
    """The chunk's tensor, its first element there, how many elements are left, and if 16-byte accesses are right.

    The last is a promise that the compiler relies on: the chunk is whole and every address a multiple of 16 bytes.
    """
    low = chunk * 0
    high = T + low
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle) <= chunk
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    offset = (chunk - tl.load(table + low)) * CHUNK
    left = tl.load(table + T + low) - offset
    return low, offset, left, (left >= CHUNK) & (tl.load(table + 2 * T + low) != 0)


@triton.jit
def pointer_to(table, T, t, row, offset, DTYPE: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr):
    """Pointer to a chunk of tensor t in a row of addresses.

    16-byte accesses need both hints, on the pointer and on the offset, and no mask that depends on the lane.
    """
    pointer = tl.load(table + (3 + row) * T + t).to(tl.pointer_type(DTYPE))
    if FULL:
        pointer = tl.multiple_of(pointer, 16)
        offset = tl.multiple_of(offset, CHUNK)
    return pointer + offset


@triton.jit
def last_program(ticket, programs):
    """Whether this program is the last of a launch to come here; what the others did before is seen by it then.

    ticket: int32, 0 before the launch, and `programs` after. All threads of a program have done what stands before
    (the barrier), and the one that takes the ticket passes that on, and takes over what others passed on (acq_rel).
    """
    tl.debug_barrier()
    return tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """The numbers in a tensor's type, rounded to nearest even."""
    if _INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        # the interpreter (triton 3.6 to 3.8) cuts the lower bits off; hardware rounds
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def double(x):
    """A number, an argument of a kernel, as a float64 tensor: the interpreter passes plain Python numbers."""
    return tl.full((), x, tl.float64)
