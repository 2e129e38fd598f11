"""What every test shares: the backends that can run here, and a torch that repeats itself."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
import torch

import dtokd_kernels as dk
from dtokd_kernels import backends, libraries

from . import emulated
from .device import DEVICE, put_tensors_on_device

put_tensors_on_device()

#: Those that take tensors of a device. On CPU tensors "cuda" runs its kernels through an emulation.
BACKENDS_OF = {"cpu": ("cpu", "cuda", "reference"), "cuda": ("cuda", "triton", "reference")}
EMULATED = DEVICE.type == "cpu"
if backends.interpreted():  # Triton's kernels on CPU tensors: slow, so a process of its own
    BACKENDS_OF["cpu"] = ("cpu", "triton", "reference")


def available_backends() -> list[str]:
    """The backends under test: those of the device that can run here.

    Raises:
        pytest.UsageError: DTOKD_REQUIRE_NATIVE=1, and a compiled one cannot: a run that tested the reference alone
            would look the same as one that tested everything.
    """
    reasons = {name: backends.missing(name) for name in BACKENDS_OF[DEVICE.type]}
    if EMULATED and "cuda" in reasons:
        off = os.environ.get("DTOKD_EMULATION") == "0"
        reasons["cuda"] = "DTOKD_EMULATION=0" if off else None if shutil.which("g++") else "no g++ to emulate it"
    compiled = DEVICE.type
    if reasons[compiled] is not None and os.environ.get("DTOKD_REQUIRE_NATIVE") == "1":
        raise pytest.UsageError(f"DTOKD_REQUIRE_NATIVE=1, but backend {compiled!r} is missing: {reasons[compiled]}")
    return [name for name, reason in reasons.items() if reason is None]


BACKENDS = available_backends()


def pytest_configure(config) -> None:
    # Triton's interpreter computes in numpy, which warns of what kernels do on purpose, such as inf * 0
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:numpy.*")
    # timm's reader leaves files to the garbage collector
    config.addinivalue_line("filterwarnings", "ignore:unclosed file:ResourceWarning")
    # many tests take state or copies that some backend has no kernel for; test_plan.py is about the warning
    config.addinivalue_line("filterwarnings", "ignore:.*updated in plain torch, which is slower:UserWarning")
    for text in (
        ".*does not have a deterministic implementation",
        ".*Synchronization debug mode is a prototype feature",
        ".*Profiler clears events at the end of each cycle",  # torch 2.10 and 2.11, whatever a profiler does
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{text}:UserWarning")


#: Modules that compile C++ or train for a minute or more, the slowest first. They begin before the others, so that no
#: process of the tests is left alone with one of them at the end; `-m "not slow"` leaves them out.
SLOW = (
    "test_core",
    "test_mutations",
    "test_packaging",
    "test_emulation",
    "test_benchmarks",
    "test_train_resume",
    "test_train_ranks",
    "test_detect_run",
    "test_distributed",
    "test_cuda_launches",
    "test_train",
    "test_ptx_triton",
    "test_ptx",
    "test_kernels_static",
    "test_triton",
    "test_train_history",
    "test_train_changed_options",
    "test_train_report",
    "test_teacher_cache",
    "test_trainers",
    "test_foundation_teachers",
    "test_way_out",
    "test_told",
    "test_divergence",
    "test_demo",
    "test_detect_recipes",
    "test_detect_demo",
    "test_long_run",
    "test_evidence",
    "test_examples",
)


def pytest_collection_modifyitems(items) -> None:
    places = {name: place for place, name in enumerate(SLOW)}

    def place(item):
        return places.get(item.module.__name__.rpartition(".")[2], len(SLOW))

    for item in items:
        if place(item) < len(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=place)  # within a module, and among the others, the order stays


def pytest_report_header() -> list[str]:
    where = f"{DEVICE} ({torch.cuda.get_device_name(DEVICE) if DEVICE.type == 'cuda' else libraries.instructions()})"
    lines = [f"dtokd: on {where}; backends under test: {', '.join(BACKENDS)}"]
    lines += [f"dtokd: not tested: {n}: {backends.missing(n)}" for n in backends.NAMES if n not in BACKENDS]
    return lines


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    """The CUDA extension, compiled for the emulation; DTOKD_EMULATED_LIBRARY names one that `tests.emulated` has built.

    It is compiled anew in each process otherwise, which takes a quarter of a minute.
    """
    if built := os.environ.get("DTOKD_EMULATED_LIBRARY"):
        return Path(built).resolve(strict=True)
    return emulated.build(tmp_path_factory.mktemp("emulated"))


#: Where the emulation runs too, which is slow: modules that reach every operation with every kind of argument.
EMULATED_IN = (
    "test_backward",
    "test_balance",
    "test_combine",
    "test_gram",
    "test_lion",
    "test_optim",
    "test_overflow",
    "test_precision",
    "test_step",
)


def pytest_generate_tests(metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        module = metafunc.module.__name__.rpartition(".")[2]
        slow = ("cuda",) if EMULATED and module not in EMULATED_IN else ()
        metafunc.parametrize("backend", [name for name in BACKENDS if name not in slow], indirect=True)


@pytest.fixture
def backend(request):
    """Runs the test once per backend, inside `use_backend`; the value is the backend's name."""
    with contextlib.ExitStack() as stack:
        if request.param == "cuda" and EMULATED:
            stack.enter_context(emulated.emulated_cuda(request.getfixturevalue("emulated_library")))
        stack.enter_context(dk.use_backend(request.param))
        yield request.param


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder of images for `dtokd train`."""
    from .digits import write_digits  # needs more than the kernels' tests

    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Weights of a teacher of theirs."""
    from .digits import write_teacher

    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """Images and annotations for `dtokd detect`."""
    from .coco import write_coco

    return write_coco(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture
def one_thread():
    """Another number rounds otherwise; `reproducible` puts it back."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def reproducible(monkeypatch):
    """Fixed seeds; no backend chosen from outside; fresh memory is NaN, so that nobody reads it unnoticed."""
    monkeypatch.delenv("DTOKD_BACKEND", raising=False)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    # fills torch.empty with NaN; not all of torch's own GPU operations have a deterministic form
    torch.use_deterministic_algorithms(True, warn_only=DEVICE.type == "cuda")
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
