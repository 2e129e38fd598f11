"""What every test shares: the backends that can run here, and a torch that repeats itself."""

import contextlib
import os
import shutil

import pytest
import torch

import dtokd_kernels as dk
from dtokd_kernels import backends

from . import emulated

#: On CPU tensors. "cuda" runs its kernels through an emulation there.
CPU_BACKENDS = ("cpu", "cuda", "reference")


def available_backends() -> list[str]:
    """The backends that can take CPU tensors here.

    Raises:
        pytest.UsageError: DTOKD_REQUIRE_NATIVE=1, and the compiled one cannot: a run that tested the reference
            alone would look the same as one that tested everything.
    """
    reason = backends.missing("cpu")
    if reason is not None and os.environ.get("DTOKD_REQUIRE_NATIVE") == "1":
        raise pytest.UsageError(f"DTOKD_REQUIRE_NATIVE=1, but backend 'cpu' is missing: {reason}")
    compiler = shutil.which("g++") is not None
    there = {"cpu": reason is None, "cuda": compiler and os.environ.get("DTOKD_EMULATION") != "0", "reference": True}
    return [name for name in CPU_BACKENDS if there[name]]


BACKENDS = available_backends()


def pytest_report_header() -> list[str]:
    lines = [f"dtokd: backends under test on the CPU: {', '.join(BACKENDS)} ({dk.backend_info()['instructions']})"]
    lines += [f"dtokd: not tested: {n}: {backends.missing(n)}" for n in backends.NAMES if n not in BACKENDS]
    return lines


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    """The CUDA extension, compiled for the emulation."""
    return emulated.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs the test once per backend, inside `use_backend`; the value is the backend's name."""
    with contextlib.ExitStack() as stack:
        if request.param == "cuda":
            stack.enter_context(emulated.emulated_cuda(request.getfixturevalue("emulated_library")))
        stack.enter_context(dk.use_backend(request.param))
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
