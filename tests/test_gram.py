"""dk.gram against exact sums: every dtype, size, layout and kind of list, and the same bits every time."""

import itertools
import math
from functools import cache

import pytest
import torch

import dtokd_kernels as dk

from . import tolerances
from .inputs import CHUNK, DTYPES, IMAGE, LAYOUTS, LIST_WITH_EMPTIES, SIZES, each_dtype, gradients


def exact_gram(grads):
    """(Gram matrix [K, K] of the given, rounded values, sums of absolute products [K, K]), both float64.

    Products are exact in float64 for all types but float64, whose rounding `gram_bound` counts; `math.fsum` adds them
    without error.
    """
    K = len(grads)
    truth, absolute = torch.zeros(K, K, dtype=torch.float64), torch.zeros(K, K, dtype=torch.float64)
    for i, j in itertools.combinations_with_replacement(range(K), 2):
        products = [
            (a.double() * b.double()).flatten()
            for a, b in zip(grads[i], grads[j], strict=True)
            if a is not None and b is not None
        ]
        products = torch.cat(products) if products else torch.zeros(0)
        truth[i, j] = truth[j, i] = math.fsum(products.tolist())
        absolute[i, j] = absolute[j, i] = math.fsum(products.abs().tolist())
    return truth, absolute


def sizes_of(grads):
    return [next((g.numel() for g in position if g is not None), 0) for position in zip(*grads, strict=True)]


def assert_gram(result, grads, truth=None):
    exact, absolute = exact_gram(grads) if truth is None else truth
    bound = tolerances.gram_bound(absolute, sizes_of(grads))
    assert result.dtype == torch.float64
    assert result.shape == exact.shape
    assert torch.equal(result, result.T)
    assert ((result - exact).abs() <= bound).all(), f"error {(result - exact).abs()} above {bound}"


@cache
def one_tensor(size, dtype):
    grads = gradients(8, [size], dtype, seed=size % 97)
    return grads, exact_gram(grads)


@each_dtype
@pytest.mark.parametrize("K", range(1, 9))
def test_is_exact_to_rounding(backend, K, dtype):
    for size in SIZES:
        grads, (truth, absolute) = one_tensor(size, dtype)
        assert_gram(dk.gram(grads[:K]), grads[:K], (truth[:K, :K], absolute[:K, :K]))


@each_dtype
@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_list_with_empty_tensors(backend, K, dtype):
    grads = gradients(K, LIST_WITH_EMPTIES, dtype)
    assert_gram(dk.gram(grads), grads)


def test_many_small_tensors(backend):
    grads = gradients(3, [n % 40 for n in range(1500)], torch.float32)
    assert_gram(dk.gram(grads), grads)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_dtype
def test_layouts(backend, layout, dtype):
    grads = gradients(3, [IMAGE, IMAGE], dtype)
    laid_out = [[LAYOUTS[layout](g) for g in row] for row in grads]
    assert_gram(dk.gram(laid_out), grads)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(LAYOUTS, 2)))
def test_layouts_may_differ_between_objectives(backend, first, second):
    grads = gradients(2, [IMAGE], torch.float32)
    laid_out = [[LAYOUTS[first](grads[0][0])], [LAYOUTS[second](grads[1][0])]]
    assert_gram(dk.gram(laid_out), grads)


def test_expanded_tensors(backend):
    grads = [[torch.tensor(2.0).expand(3, 4)], [torch.arange(4.0).expand(3, 4)]]
    assert torch.equal(dk.gram(grads), torch.tensor([[48.0, 36.0], [36.0, 42.0]], dtype=torch.float64))


def test_dtypes_may_differ_between_positions(backend):
    rows = [gradients(3, [17, (3, 5)], dtype, seed=i) for i, dtype in enumerate(DTYPES)]
    grads = [[g for row in rows for g in row[k]] for k in range(3)]
    assert_gram(dk.gram(grads), grads)


@pytest.mark.parametrize("K", [2, 3, 8])
def test_none_counts_as_zero(backend, K):
    grads = gradients(K, [13, 64, 7, 100], torch.float32)
    grads[0][0] = None  # one
    for row in grads[:-1]:
        row[1] = None  # all but one
    for row in grads:
        row[2] = None  # all
    assert_gram(dk.gram(grads), grads)


@pytest.mark.parametrize("K", [2, 3, 8])
@pytest.mark.parametrize("absent", [0, -1])
def test_absent_objective_has_exact_zeros(backend, K, absent):
    grads = gradients(K, [(0,), 1023], torch.float32)
    grads[absent] = [None, None]
    G = dk.gram(grads)
    assert (G[absent] == 0).all()
    assert (G[:, absent] == 0).all()
    assert_gram(G, grads)


@each_dtype
@pytest.mark.parametrize("K", [1, 2, 3, 8])
def test_same_bits_for_any_number_of_threads(backend, K, dtype):
    grads = gradients(K, [3 * CHUNK + 5, 100, 2 * CHUNK - 1], dtype)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(dk.gram(grads))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("layout", ["misaligned", "channels_last"])
def test_same_bits_for_any_alignment_and_order(backend, layout):
    """The kernels sum in memory's order, so gradients that all are laid out alike give what their memory gives."""
    if backend == "reference" and layout == "channels_last":
        return  # sums in the order of the indices
    grads = gradients(3, [IMAGE], torch.float32)
    laid_out = [[LAYOUTS[layout](g) for g in row] for row in grads]
    flat = [
        [g.permute(0, 2, 3, 1).flatten() if layout == "channels_last" else g.flatten() for g in row] for row in grads
    ]
    assert torch.equal(dk.gram(laid_out), dk.gram(flat))


@each_dtype
@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_not_finite_shows(backend, K, dtype):
    """In every entry of its row and column, and in no other; wherever it stands."""
    for where, bad in itertools.product((0, 1000, -1), (float("nan"), float("inf"), float("-inf"))):
        grads = gradients(K, [1037], dtype)
        clean = dk.gram(grads)
        grads[K - 1][0][where] = bad
        G = dk.gram(grads)
        assert not G[K - 1].isfinite().any()
        assert not G[:, K - 1].isfinite().any()
        assert torch.equal(G[: K - 1, : K - 1], clean[: K - 1, : K - 1])


@pytest.mark.parametrize("exponent", [-60, 60])
def test_scale_of_gradients(backend, exponent):
    """A power of two passes through without a rounding: squares of 1e-18 or 1e18 neither vanish nor overflow."""
    grads = gradients(2, [1000], torch.float32)
    scaled = [[g * 2.0**exponent for g in row] for row in grads]
    assert torch.equal(dk.gram(scaled), dk.gram(grads) * 4.0**exponent)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_changes_nothing(backend, layout):
    grads = [[LAYOUTS[layout](g) for g in row] for row in gradients(3, [IMAGE, IMAGE], torch.float32)]
    grads[1][0] = None
    present = [g for row in grads for g in row if g is not None]
    before = [g.clone() for g in present]
    versions = [g._version for g in present]
    dk.gram(grads)
    assert all(torch.equal(a, b) for a, b in zip(before, present, strict=True))
    assert versions == [g._version for g in present]


def test_is_not_differentiable(backend):
    assert not dk.gram([[torch.ones(3, requires_grad=True)], [torch.ones(3)]]).requires_grad


def test_golden(backend):
    grads = [[torch.tensor([-4.0, 1.0]), torch.tensor([1.0])], [torch.tensor([6.0, 1.0]), torch.tensor([1.0])]]
    assert torch.equal(dk.gram(grads), torch.tensor([[18.0, -22.0], [-22.0, 38.0]], dtype=torch.float64))
