"""The Gram matrices of K gradients by role: sums per chunk, then the sum over chunks.

NOTE [Sums]: products and sums are in float64, as in the reference and in C++. Every addition has its place, whatever
the compiler does: within a chunk lane l adds up the elements of its 16 bytes and of every 256th 16 bytes after, in
memory's order; lanes are then added in pairs of neighbours, level by level, and chunks in the same way. A sum of two
has one result whichever comes first, so the bits depend on sizes and dtype only: not on the number of warps, the
alignment, the GPU or triton's version. No sum is made of atomic additions.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment, var-annotated"
# ruff: noqa: RUF005 (triton knows no starred tuples)

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import CHUNK, DTYPES, VECTOR_BYTES, Table, find, pointer_to, table_of

LANES = 256


class Member(NamedTuple):
    """Gradients that one launch can take.

    Attributes:
        role: the row of `Role` that they belong to.
        reach: bit i set if objective i has a gradient here.
        lists: T tensors, that fit each other, for each of these objectives.
    """

    role: int
    reach: int
    lists: Sequence[Sequence[Tensor]]


class Partials(NamedTuple):
    """Sums per chunk of all members, role after role, on their device.

    Attributes:
        sums: float64, for each role [K(K+1)/2, its chunks], pairs i <= j row by row.
        chunks: of each role.
        ticket: int32 scalar, 0: for the launch that adds them up.
    """

    sums: Tensor
    chunks: tuple[int, ...]
    ticket: Tensor


def partial_sums(members: Sequence[Member], K: int) -> Partials:
    """The sums per chunk, by one launch for each member that has elements."""
    tables: list[Table] = [table_of(member.lists) for member in members]
    chunks = [0, 0, 0]
    before = []  # chunks of the same role in earlier members
    for member, table in zip(members, tables, strict=True):
        before.append(chunks[member.role])
        chunks[member.role] += table.chunks
    device, pairs = tables[0].numbers.device, K * (K + 1) // 2
    partials = torch.empty(pairs * sum(chunks), dtype=torch.float64, device=device)
    # the first launch sets the ticket to 0
    ticket = (torch.empty if sum(chunks) else torch.zeros)((), dtype=torch.int32, device=device)
    for (role, reach, lists), table, first in zip(members, tables, before, strict=True):
        if table.chunks == 0:
            continue
        dtype = lists[0][0].dtype
        gram_kernel[(table.chunks,)](
            table.numbers,
            table.tensors,
            partials,
            pairs * sum(chunks[:role]) + first,
            chunks[role],
            ticket,
            K=K,
            REACH=reach,
            DTYPE=DTYPES[dtype],
            CHUNK=CHUNK,
            VECTOR=VECTOR_BYTES // dtype.itemsize,
            LANES=LANES,
            num_warps=LANES // 32,
        )
    return Partials(partials, tuple(chunks), ticket)


def gram_by_role(members: Sequence[Member], K: int) -> Tensor:
    """Gram matrices [3, K, K] float64, one for each role: a launch for each member, and one more."""
    partials = partial_sums(members, K)
    return added_up(partials.sums, partials.chunks, K)


def added_up(sums: Tensor, chunks: Sequence[int], K: int) -> Tensor:
    """The Gram matrices [3, K, K] float64 of sums per chunk, as `Partials` has them. One launch."""
    out = torch.empty(len(chunks), K, K, dtype=torch.float64, device=sums.device)
    gram_sum_kernel[(K, K, len(chunks))](sums, *chunks, out, K=K, LANES=LANES, num_warps=LANES // 32)
    return out


@triton.jit(do_not_specialize=["T", "first", "chunks"])
def gram_kernel(
    table,
    T,
    partials,
    first,
    chunks,
    ticket,
    K: tl.constexpr,
    REACH: tl.constexpr,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sums of one chunk: partials [K(K+1)/2, chunks] from `first` on, pairs i <= j row by row; and ticket = 0.

    Reads CHUNK elements for each objective in REACH, at any alignment. Launch: one program per chunk.
    """
    chunk = tl.program_id(0)
    if chunk == 0:
        tl.store(ticket, 0)
    t, offset, left, full = find(table, T, chunk, CHUNK)
    sums = partials + first + chunk
    if full:
        _sums(table, T, t, offset, left, sums, chunks, K, REACH, DTYPE, CHUNK, VECTOR, LANES, True)
    else:
        _sums(table, T, t, offset, left, sums, chunks, K, REACH, DTYPE, CHUNK, VECTOR, LANES, False)


@triton.jit
def _sums(
    table,
    T,
    t,
    offset,
    left,
    partials,
    chunks,
    K: tl.constexpr,
    REACH: tl.constexpr,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    FULL: tl.constexpr,
):
    R: tl.constexpr = objectives(REACH)
    grads = ()
    for k in tl.static_range(R):
        grads = grads + (pointer_to(table, T, t, k, offset, DTYPE, CHUNK, FULL),)
    sums = no_sums(R, LANES)
    end = CHUNK
    if not FULL:
        end = tl.minimum(left, CHUNK)
    start = 0
    while start < end:
        x = ()
        for k in tl.static_range(R):
            if FULL:
                values = tl.load(grads[k] + start + tl.arange(0, LANES * VECTOR)).to(tl.float64)
                x = x + (columns(values, VECTOR, LANES),)
            else:
                x = x + (_masked_columns(grads[k] + start, left - start, VECTOR, LANES),)
        sums = add_products(sums, x, R, VECTOR)
        start += LANES * VECTOR
    store_sums(sums, partials, chunks, K, REACH, LANES)


@triton.jit
def no_sums(R: tl.constexpr, LANES: tl.constexpr):
    """Zeros for the pairs of R gradients, in every lane."""
    sums = ()
    for _ in tl.static_range(R * (R + 1) // 2):
        sums = sums + (tl.zeros([LANES], tl.float64),)
    return sums


@triton.jit
def add_products(sums, x, R: tl.constexpr, VECTOR: tl.constexpr):
    """The sums and the products of VECTOR elements of each lane. x: the columns of R gradients."""
    for e in tl.static_range(VECTOR):
        new = ()
        for i in tl.static_range(R):
            for j in tl.static_range(i, R):
                a, b = x[i][e].to(tl.float64), x[j][e].to(tl.float64)
                new = new + (tl.fma(a, b, sums[i * R - i * (i - 1) // 2 + j - i]),)
        sums = new
    return sums


@triton.jit
def store_sums(sums, partials, chunks, K: tl.constexpr, REACH: tl.constexpr, LANES: tl.constexpr):
    """A chunk's sums over all lanes into its column of [K(K+1)/2, chunks]; 0 for pairs outside the reach."""
    for i in tl.static_range(K):
        for j in tl.static_range(i, K):
            row = partials + (i * K - i * (i - 1) // 2 + j - i) * chunks
            if (REACH >> i) & (REACH >> j) & 1:
                tl.store(row, _pairwise_sum(sums[_place(REACH, i, j)], LANES))
            else:
                tl.store(row, tl.full((), 0.0, tl.float64))


@triton.constexpr_function
def objectives(reach):
    """How many objectives a reach has."""
    return bin(reach).count("1")


@triton.constexpr_function
def _place(reach, i, j):
    """Where the pair i <= j stands among those of the objectives in `reach`."""
    R, r, s = (bin(bits).count("1") for bits in (reach, reach & ((1 << i) - 1), reach & ((1 << j) - 1)))
    return r * R - r * (r - 1) // 2 + s - r


@triton.jit
def columns(x, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """[LANES * VECTOR] -> VECTOR times [LANES]: element e of every lane; a thread has its lane's in registers."""
    if VECTOR == 1:
        return (x,)
    elif VECTOR == 2:
        a, b = tl.split(tl.reshape(x, [LANES, 2]))
        return a, b
    elif VECTOR == 4:
        even, odd = tl.split(tl.reshape(x, [LANES, 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d
    else:
        even, odd = tl.split(tl.reshape(x, [LANES, 2, 2, 2]))
        ae, cg = tl.split(even)
        bf, dh = tl.split(odd)
        a, e = tl.split(ae)
        b, f = tl.split(bf)
        c, g = tl.split(cg)
        d, h = tl.split(dh)
        return a, b, c, d, e, f, g, h


@triton.jit
def _masked_columns(pointer, left, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """The same from memory, of which only `left` elements are there; zeros after."""
    x = ()
    for e in tl.static_range(VECTOR):
        element = VECTOR * tl.arange(0, LANES) + e
        x = x + (tl.load(pointer + element, mask=element < left, other=0.0).to(tl.float64),)
    return x


@triton.jit
def _pairwise_sum(x, LANES: tl.constexpr):
    """The sum of [LANES], a power of two, neighbours first; see NOTE [Sums]."""
    for level in tl.static_range(10):
        if LANES >> level > 2:
            x = tl.sum(tl.reshape(x, [LANES >> (level + 1), 2]), axis=1)
    return tl.sum(x)


@triton.jit(do_not_specialize=["shared", "private", "plain"])
def gram_sum_kernel(partials, shared, private, plain, out, K: tl.constexpr, LANES: tl.constexpr):
    """Entry (i, j) of a role's matrix in out [3, K, K]. shared, ...: the roles' chunks. Launch: K x K x 3 programs."""
    sum_entry(partials, shared, private, plain, out, K, LANES)


@triton.jit
def sum_entry(partials, shared, private, plain, out, K: tl.constexpr, LANES: tl.constexpr):
    """What one program of `gram_sum_kernel` does: adds up one row of partials."""
    role = tl.program_id(2)
    i = tl.minimum(tl.program_id(0), tl.program_id(1))
    j = tl.maximum(tl.program_id(0), tl.program_id(1))
    before = tl.where(role == 0, 0, tl.where(role == 1, shared, shared + private))
    chunks = tl.where(role == 0, shared, tl.where(role == 1, private, plain))
    row = partials + before.to(tl.int64) * (K * (K + 1) // 2)
    row += (i * K - i * (i - 1) // 2 + j - i).to(tl.int64) * chunks
    total = tl.zeros([LANES], tl.float64)
    start = 0
    while start < chunks:
        lane = start + tl.arange(0, LANES)
        total += tl.load(row + lane, mask=lane < chunks, other=0.0)
        start += LANES
    entry = (role * K + tl.program_id(0)) * K + tl.program_id(1)
    tl.store(out + entry, _pairwise_sum(total, LANES))
