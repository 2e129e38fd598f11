"""The Gram matrix of K gradients: sums per chunk, then the sum over chunks.

NOTE [Sums]: products and sums are in float64, as in the reference and in C++. Every addition has its place, whatever
the compiler does: within a chunk lane l adds up the elements of its 16 bytes and of every 256th 16 bytes after, in
memory's order; lanes are then added in pairs of neighbours, level by level, and chunks in the same way. A sum of two
has one result whichever comes first, so the bits depend on sizes and dtype only: not on the number of warps, the
alignment, the GPU or triton's version. No atomics.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment, var-annotated"
# ruff: noqa: RUF005 (triton knows no starred tuples)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import CHUNK, DTYPES, VECTOR_BYTES, Table, find, pointer_to, table_of

LANES = 256


def gram(grads: Sequence[Sequence[Tensor]]) -> Tensor:
    """Gram matrix [K, K] float64 of K lists of T tensors that fit each other; two launches."""
    K, dtype = len(grads), grads[0][0].dtype
    table: Table = table_of(grads)
    partials = torch.empty(K * (K + 1) // 2, table.chunks, dtype=torch.float64, device=table.numbers.device)
    out = torch.empty(K, K, dtype=torch.float64, device=table.numbers.device)
    if table.chunks:
        gram_kernel[(table.chunks,)](
            table.numbers,
            table.tensors,
            partials,
            table.chunks,
            K=K,
            DTYPE=DTYPES[dtype],
            CHUNK=CHUNK,
            VECTOR=VECTOR_BYTES // dtype.itemsize,
            LANES=LANES,
            num_warps=LANES // 32,
        )
    gram_sum_kernel[(K, K)](partials, table.chunks, out, K=K, LANES=LANES, num_warps=LANES // 32)
    return out


@triton.jit(do_not_specialize=["T", "chunks"])
def gram_kernel(
    table,
    T,
    partials,
    chunks,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sums of one chunk: partials [K(K+1)/2, chunks], pairs i <= j row by row.

    Reads K * CHUNK elements, at any alignment. Launch: one program per chunk.
    """
    chunk = tl.program_id(0)
    t, offset, left, full = find(table, T, chunk, CHUNK)
    if full:
        _sums(table, T, t, offset, left, partials + chunk, chunks, K, DTYPE, CHUNK, VECTOR, LANES, True)
    else:
        _sums(table, T, t, offset, left, partials + chunk, chunks, K, DTYPE, CHUNK, VECTOR, LANES, False)


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
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    FULL: tl.constexpr,
):
    grads = ()
    for k in tl.static_range(K):
        grads = grads + (pointer_to(table, T, t, k, offset, DTYPE, CHUNK, FULL),)
    sums = ()
    for _ in tl.static_range(K * (K + 1) // 2):
        sums = sums + (tl.zeros([LANES], tl.float64),)
    end = CHUNK
    if not FULL:
        end = tl.minimum(left, CHUNK)
    start = 0
    while start < end:
        x = ()
        for k in tl.static_range(K):
            if FULL:
                values = tl.load(grads[k] + start + tl.arange(0, LANES * VECTOR)).to(tl.float64)
                x = x + (_columns(values, VECTOR, LANES),)
            else:
                x = x + (_masked_columns(grads[k] + start, left - start, VECTOR, LANES),)
        for e in tl.static_range(VECTOR):
            new = ()
            for i in tl.static_range(K):
                for j in tl.static_range(i, K):
                    new = new + (tl.fma(x[i][e], x[j][e], sums[i * K - i * (i - 1) // 2 + j - i]),)
            sums = new
        start += LANES * VECTOR
    for pair in tl.static_range(K * (K + 1) // 2):
        tl.store(partials + pair * chunks, _pairwise_sum(sums[pair], LANES))


@triton.jit
def _columns(x, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """[LANES * VECTOR] -> VECTOR times [LANES]: element e of every lane; a thread has its lane's in registers."""
    if VECTOR == 2:
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


@triton.jit(do_not_specialize=["chunks"])
def gram_sum_kernel(partials, chunks, out, K: tl.constexpr, LANES: tl.constexpr):
    """Entry (i, j) of out [K, K] adds up one row of partials. Launch: K x K programs."""
    i = tl.minimum(tl.program_id(0), tl.program_id(1))
    j = tl.maximum(tl.program_id(0), tl.program_id(1))
    row = partials + (i * K - i * (i - 1) // 2 + j - i).to(tl.int64) * chunks
    total = tl.zeros([LANES], tl.float64)
    start = 0
    while start < chunks:
        lane = start + tl.arange(0, LANES)
        total += tl.load(row + lane, mask=lane < chunks, other=0.0)
        start += LANES
    tl.store(out + tl.program_id(0) * K + tl.program_id(1), _pairwise_sum(total, LANES))
