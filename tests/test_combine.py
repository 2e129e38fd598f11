"""dk.combine against float64 sums of the same rounded gradients."""

from functools import cache

import pytest
import torch

import dtokd_kernels as dk

from . import tolerances
from .inputs import CHUNK, DTYPES, IMAGE, LAYOUTS, LIST_WITH_EMPTIES, SIZES, each_dtype, gradients

COEFFICIENTS = torch.tensor([0.6, -0.4, 1.0, 3.7e-3, 0.0, -2.5, 1 / 3, 17.0], dtype=torch.float64)


def assert_combined(values, grads, coefficients):
    """Each value against the sum over the objectives that are not None, in float64."""
    assert len(values) == len(grads[0])
    for t, value in enumerate(values):
        terms = [(c, row[t]) for c, row in zip(coefficients, grads, strict=True) if row[t] is not None]
        like = terms[0][1]
        assert (value.shape, value.dtype) == (like.shape, like.dtype)
        assert_one(value, [g for _, g in terms], torch.stack([c for c, _ in terms]))


def assert_one(value, grads, coefficients):
    truth, error = tolerances.combined(grads, coefficients, value.dtype)
    bound = tolerances.stored(truth, error, value.dtype)
    assert ((value.double() - truth).abs() <= bound).all()


@cache
def one_tensor(size, dtype):
    return gradients(8, [size], dtype, seed=size % 89)


@each_dtype
@pytest.mark.parametrize("K", range(1, 9))
def test_is_exact_to_rounding(backend, K, dtype):
    for size in SIZES:
        grads = one_tensor(size, dtype)[:K]
        assert_combined(dk.combine(grads, COEFFICIENTS[:K]), grads, COEFFICIENTS[:K])


@each_dtype
def test_list_with_empty_tensors(backend, dtype):
    grads = gradients(3, LIST_WITH_EMPTIES, dtype)
    assert_combined(dk.combine(grads, COEFFICIENTS[:3]), grads, COEFFICIENTS[:3])


def test_empty_list(backend):
    assert dk.combine([[], []], [0.5, 0.5]) == []


@each_dtype
@pytest.mark.parametrize("first", LAYOUTS)
def test_layouts(backend, first, dtype):
    grads = gradients(2, [IMAGE], dtype)
    for second in LAYOUTS:
        laid_out = [[LAYOUTS[first](grads[0][0])], [LAYOUTS[second](grads[1][0])]]
        assert_combined(dk.combine(laid_out, COEFFICIENTS[:2]), grads, COEFFICIENTS[:2])


def test_expanded_tensors(backend):
    grads = [[torch.tensor(2.0).expand(3, 4)], [torch.arange(4.0).expand(3, 4)]]
    [value] = dk.combine(grads, [1.0, 2.0])
    assert torch.equal(value, 2 + 2 * torch.arange(4.0).expand(3, 4))


def test_dtypes_may_differ_between_positions(backend):
    rows = [gradients(3, [17, (3, 5)], dtype, seed=i) for i, dtype in enumerate(DTYPES)]
    grads = [[g for row in rows for g in row[k]] for k in range(3)]
    assert_combined(dk.combine(grads, COEFFICIENTS[:3]), grads, COEFFICIENTS[:3])


@pytest.mark.parametrize("K", [2, 3, 8])
def test_none_counts_as_zero(backend, K):
    grads = gradients(K, [13, 64, 7], torch.float32)
    grads[0][0] = None
    for row in grads[:-1]:
        row[1] = None
    assert_combined(dk.combine(grads, COEFFICIENTS[:K]), grads, COEFFICIENTS[:K])


def test_position_of_only_none_is_refused(backend):
    grads = gradients(2, [3, 4], torch.float32)
    grads[0][1] = grads[1][1] = None
    with pytest.raises(ValueError, match=r"combine: position 1 is None in all grads; leave it out"):
        dk.combine(grads, [0.5, 0.5])


@pytest.mark.parametrize(
    "coefficients", [[0.6, 0.4], (0.6, 0.4), torch.tensor([0.6, 0.4])], ids=["list", "tuple", "float32"]
)
def test_kinds_of_coefficients(backend, coefficients):
    grads = gradients(2, [33], torch.float64)
    assert_combined(dk.combine(grads, coefficients), grads, torch.as_tensor(coefficients).double())


@pytest.mark.parametrize("layout", LAYOUTS)
@each_dtype
def test_out_of_its_own(backend, dtype, layout):
    grads = gradients(3, [IMAGE, IMAGE], dtype)
    out = [LAYOUTS[layout](torch.empty_like(g)) for g in grads[0]]
    result = dk.combine(grads, COEFFICIENTS[:3], out=out)
    assert all(a is b for a, b in zip(result, out, strict=True))
    assert_combined(out, grads, COEFFICIENTS[:3])


@pytest.mark.parametrize("layout", LAYOUTS)
@each_dtype
def test_out_may_be_one_of_the_lists(backend, dtype, layout):
    grads = gradients(3, [IMAGE, IMAGE], dtype)
    for target in range(3):
        laid_out = [[LAYOUTS[layout](g) for g in row] for row in grads]
        result = dk.combine(laid_out, COEFFICIENTS[:3], out=laid_out[target])
        assert all(a is b for a, b in zip(result, laid_out[target], strict=True))
        assert_combined(result, grads, COEFFICIENTS[:3])
        others = [k for k in range(3) if k != target]
        assert all(torch.equal(g, h) for k in others for g, h in zip(grads[k], laid_out[k], strict=True))


def test_in_place_over_chunks(backend):
    grads = gradients(2, [2 * CHUNK + 3], torch.float32)
    copies = [[g.clone() for g in row] for row in grads]
    dk.combine(copies, COEFFICIENTS[:2], out=copies[0])
    assert_combined(copies[0], grads, COEFFICIENTS[:2])


def test_sums_of_low_precision_do_not_overflow_on_the_way(backend):
    grads = [[torch.full((40,), 60000.0, dtype=torch.float16)], [torch.full((40,), 60000.0, dtype=torch.float16)]]
    [value] = dk.combine(grads, [2.0, -1.9])
    assert_one(value, [g for [g] in grads], torch.tensor([2.0, -1.9], dtype=torch.float64))
    assert value.isfinite().all()


@each_dtype
def test_same_bits_for_any_number_of_threads(backend, dtype):
    grads = gradients(3, [2 * CHUNK + 5, 100], dtype)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(dk.combine(grads, COEFFICIENTS[:3]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_changes_nothing_without_out(backend, layout):
    grads = [[LAYOUTS[layout](g) for g in row] for row in gradients(3, [IMAGE], torch.float32)]
    before = [g.clone() for [g] in grads]
    versions = [g._version for [g] in grads]
    [value] = dk.combine(grads, COEFFICIENTS[:3])
    value.fill_(7.0)  # shares no memory with its inputs
    assert all(torch.equal(a, b) for a, [b] in zip(before, grads, strict=True))
    assert versions == [g._version for [g] in grads]


def test_writing_out_shows_in_its_version(backend):
    """Autograd finds out that a saved tensor was written to by its version."""
    grads = gradients(2, [33], torch.float32)
    out = [torch.zeros(33)]
    before = out[0]._version
    dk.combine(grads, [0.5, 0.5], out=out)
    assert out[0]._version > before


def test_golden(backend):
    grads = [[torch.tensor([-4.0, 1.0]), torch.tensor([1.0])], [torch.tensor([6.0, 1.0]), torch.tensor([1.0])]]
    values = torch.cat(dk.combine(grads, torch.tensor([0.6, 0.4])))
    # u (float32 coefficients) of the largest term, 2.4, and as much for the sum
    torch.testing.assert_close(values, torch.tensor([0.0, 1.0, 1.0]), rtol=0, atol=5 * 2.4 * 2**-24)
