"""The Gram matrix of two gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import dtokd_kernels as dk

from .cases import Case, foreach_gram

WAYS: dict[str, Callable[[Case], object]] = {
    "dtokd": lambda case: dk.gram(case.grads, backend="cpu"),
    "foreach": lambda case: foreach_gram(case.grads),
    "reference": lambda case: dk.gram(case.grads, backend="reference"),
}


@pytest.mark.parametrize("way", WAYS)
def test_gram(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    benchmark(WAYS[way], case)
