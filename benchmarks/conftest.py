"""One case per model for the micro-benchmarks: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import MODELS, Case, shapes_of


@pytest.fixture(params=MODELS, scope="session")
def case(request: pytest.FixtureRequest) -> Case:
    """Inputs with the parameter shapes of one model, both weights positive."""
    return Case.build(shapes_of(request.param), "interior")


@pytest.fixture(autouse=True)
def _group_by_model(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> None:
    function = request.function.__name__.removeprefix("test_")
    benchmark.group = f"{function}, {request.node.callspec.params['case']}"
