"""The combination of two gradients, into new tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import dtokd_kernels as dk

from .cases import Case

COEFFICIENTS = (0.4, 0.1)


def foreach_combine(grads: Sequence[list[Tensor]]) -> list[Tensor]:
    combined = torch._foreach_mul(grads[0], COEFFICIENTS[0])
    torch._foreach_add_(combined, grads[1], alpha=COEFFICIENTS[1])
    return list(combined)


WAYS: dict[str, Callable[[Case], object]] = {
    "dtokd": lambda case: dk.combine(case.grads, COEFFICIENTS, backend="cpu"),
    "foreach": lambda case: foreach_combine(case.grads),
    "reference": lambda case: dk.combine(case.grads, COEFFICIENTS, backend="reference"),
}


@pytest.mark.parametrize("way", WAYS)
def test_combine(benchmark: BenchmarkFixture, case: Case, way: str) -> None:
    benchmark(WAYS[way], case)
