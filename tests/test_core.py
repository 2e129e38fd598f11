"""The torch-free C++ core: CMake builds it, its own tests pass under sanitizers, and all instruction sets agree."""

import math
import subprocess

import pytest
import torch

from . import cmake
from .inputs import CHUNK

DTYPES = ("float32", "float64", "bfloat16", "float16")
#: Numbers of update_rules.h, in its order.
ADAMW, SGD = [1e-2, 0.9, 0.999, 0.1, 1e-8, 0, 0], [1e-2, 0.9, 0.999, 0.1, 1, 0, 0]
SIZES = (1, 0, 7, 16, 63, 1000, CHUNK, CHUNK + 1, 0)


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    return cmake.load(cmake.build(tmp_path_factory.mktemp("core"), "dtokd_core_python"), "dtokd_core_python")


@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_core_tests_pass_under_sanitizers(tmp_path, sanitize):
    folder = cmake.build(tmp_path, "dtokd_core_tests", sanitize)
    result = subprocess.run([folder / "dtokd_core_tests"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "plain: passed" in result.stdout


def lists(dtype, count, seed, positive=False):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand if positive else torch.randn
    return [draw(n, generator=generator).to(getattr(torch, dtype)) for _ in range(count) for n in SIZES]


def addresses(tensors):
    return [t.data_ptr() for t in tensors]


def test_sizes_are_around_a_chunk(core):
    assert core.chunk == CHUNK


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [1, 2, 3, 4, 8])
def test_gram_has_the_same_bits_for_every_instruction_set_and_thread_count(core, dtype, K):
    grads = lists(dtype, K, 0)
    results = {
        (name, threads): core.gram(name, threads, dtype, addresses(grads), SIZES)
        for name in core.names()
        for threads in (1, 2, 3, 7)
    }
    for (name, _), result in results.items():
        # products of float64 are rounded, but for instruction sets with a fused multiply-add
        assert result == results[name if dtype == "float64" else "plain", 1]
    exact = torch.tensor(results["plain", 1], dtype=torch.float64).view(K, K)
    wide = [torch.cat(grads[k * len(SIZES) : (k + 1) * len(SIZES)]).double() for k in range(K)]
    for i in range(K):
        for j in range(K):
            # float64 summation of n terms in chunks: |error| <= n u sum |a b|, and n u stays far below this
            bound = 1e-12 * float((wide[i] * wide[j]).abs().sum())
            assert math.isclose(exact[i, j], float(wide[i] @ wide[j]), abs_tol=bound, rel_tol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_updates_agree_between_instruction_sets(core, dtype, K):
    coefficients = [0.3 + k for k in range(K)]
    outcomes = []
    for name in core.names():
        for threads in (1, 3):
            grads = lists(dtype, K, 0)
            p, m, out = (lists(dtype, 1, seed) for seed in (1, 2, 5))
            v, largest = (lists(dtype, 1, seed, positive=True) for seed in (3, 4))
            a = [addresses(t) for t in (grads, p, m, v, largest, out)]
            core.update(name, threads, 0, dtype, a[0], SIZES, coefficients, ADAMW, 2, a[1], [a[2], a[3], a[4]])
            core.update(name, threads, 1, dtype, a[0], SIZES, coefficients, SGD, 0, a[1], [a[2]])
            core.combine(name, threads, dtype, a[0], SIZES, coefficients, a[5])
            outcomes.append((name, [*p, *m, *v, *largest, *out]))
    # fused multiply-add or not: a few roundings of the working precision, relative to the largest term of the sum
    # over objectives, which may cancel, then one of the stored one
    unit = torch.finfo(getattr(torch, dtype)).eps
    term = max(coefficients) * max(float(g.abs().max()) for g in grads if g.numel())
    for name, tensors in outcomes[1:]:
        for got, expected in zip(tensors, outcomes[0][1], strict=True):
            same_kind = name == outcomes[0][0]
            difference = (got.double() - expected.double()).abs()
            bound = 0.0 if same_kind else 4 * K * unit * (term + expected.double().abs())
            assert bool((difference <= bound).all())
