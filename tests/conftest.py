"""What every test shares: the backends that can run here, and a torch that repeats itself."""

import os

import pytest
import torch

import dtokd_kernels as dk
from dtokd_kernels import backends


def available_backends() -> list[str]:
    """The CPU backends that can run here.

    Raises:
        pytest.UsageError: DTOKD_REQUIRE_NATIVE=1, and the compiled one cannot: a run that tested the reference
            alone would look the same as one that tested everything.
    """
    reason = backends.missing("cpu")
    if reason is not None and os.environ.get("DTOKD_REQUIRE_NATIVE") == "1":
        raise pytest.UsageError(f"DTOKD_REQUIRE_NATIVE=1, but backend 'cpu' is missing: {reason}")
    return [name for name in backends.NAMES if backends.missing(name) is None and backends.takes(name, "cpu")]


BACKENDS = available_backends()


def pytest_configure(config) -> None:
    # Triton's interpreter computes in numpy, which warns of what kernels do on purpose, such as inf * 0
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:numpy.*")


def pytest_report_header() -> list[str]:
    lines = [f"dtokd: CPU backends under test: {', '.join(BACKENDS)} ({dk.backend_info()['instructions']})"]
    lines += [f"dtokd: not tested: {n}: {backends.missing(n)}" for n in backends.NAMES if n not in BACKENDS]
    return lines


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs the test once per backend, inside `use_backend`; the value is the backend's name."""
    with dk.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def reproducible(monkeypatch):
    """Fixed seeds; no backend chosen from outside; fresh memory is NaN, so that nobody reads it unnoticed."""
    monkeypatch.delenv("DTOKD_BACKEND", raising=False)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
