"""The whole step, from gradients to updated parameters, by every competitor."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import COMPETITORS, SLOW, Case


@pytest.mark.parametrize("name", COMPETITORS)
def test_step(benchmark: BenchmarkFixture, case: Case, name: str) -> None:
    competitor = COMPETITORS[name](case)
    rounds = 3 if name in SLOW else 15
    benchmark.pedantic(competitor.step, setup=competitor.prepare, rounds=rounds, warmup_rounds=1)
