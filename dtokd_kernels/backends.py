"""Which implementation runs, and why."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from . import libraries
from .implementations import Implementation, Kernels


@dataclass(frozen=True)
class Backend:
    """An implementation of the operations.

    Attributes:
        implementation: returns it; called when it is first used.
        device: the type of device that its tensors are on; None: any.
        missing: why it cannot run here, or None if it can.
        automatic: used without being asked for. (Interpreted kernels are not.)
    """

    implementation: Callable[[], Implementation]
    device: str | None
    missing: Callable[[], str | None]
    automatic: bool = True


#: What the CUDA kernels need: their tables are kernel parameters of 32 KB, which CUDA 12.1 brought (drivers from 530
#: on); and they are written for GPUs from the A100 on.
DRIVER, CAPABILITY = 12010, (8, 0)


def _cuda_missing() -> str | None:
    if (reason := libraries.missing["cuda"]) is not None:
        return reason
    return _unfit() if torch.cuda.is_available() else "torch sees no CUDA device"


def driver_version() -> int:
    """The CUDA version that the driver is for: 12010 for 12.1; a large number where it cannot be asked."""
    version = ctypes.c_int(1 << 30)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


@functools.cache
def _unfit() -> str | None:
    """Why the CUDA kernels, which are there, cannot run on this machine; or None. Warns of it, once."""
    driver = driver_version()
    reason = None
    if driver < DRIVER:
        version = f"{driver // 1000}.{driver % 1000 // 10}"
        reason = f"the driver is for CUDA {version}, the kernels need 12.1 (driver 530) or later"
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        if reason is None and capability < CAPABILITY:
            reason = f"GPU {i} has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 or later"
    if reason is not None:
        warnings.warn(f"dtokd_kernels runs without its CUDA kernels: {reason}", RuntimeWarning, stacklevel=2)
    return reason


@functools.cache
def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no GPU, and TRITON_INTERPRET=1 is not set"
    return None


@functools.cache
def _triton() -> Implementation:
    from .triton import library  # triton itself is imported only when it is used

    return library.KERNELS


@functools.cache
def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors: decided by TRITON_INTERPRET, once a process."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


_CPU = Kernels("cpu", "dtokd")
_CUDA = Kernels("cuda", "dtokd", mixed=True, resident=True, device_lr=True)
#: What computes where kernels lack something.
REFERENCE = Implementation()
#: By name, the fastest first.
_BACKENDS: dict[str, Backend] = {
    "cuda": Backend(lambda: _CUDA, "cuda", _cuda_missing),
    "triton": Backend(_triton, "cpu" if interpreted() else "cuda", _missing_triton, automatic=not interpreted()),
    "cpu": Backend(lambda: _CPU, "cpu", lambda: libraries.missing["cpu"]),
    "reference": Backend(lambda: REFERENCE, None, lambda: None),
}
NAMES = tuple(_BACKENDS)

_forced: ContextVar[str | None] = ContextVar("dtokd_backend", default=None)


def missing(name: str) -> str | None:
    """Why a backend cannot run here, or None if it can."""
    return _BACKENDS[name].missing()


def check_name(name: str, source: str) -> None:
    """Refuse a name that is no backend or cannot run here.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: it exists, but cannot run here; with the reason.
    """
    if name not in NAMES:
        raise ValueError(f"{source}: no backend is named {name!r}; choose one of {', '.join(NAMES)}")
    reason = missing(name)
    if reason is not None:
        there = ", ".join(n for n in NAMES if missing(n) is None)
        raise RuntimeError(f"{source}: backend {name!r} is not available: {reason}. Available: {there}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside a `with` block, over DTOKD_BACKEND and over an optimizer's `backend=`.

    Args:
        name: "cuda", "triton", "cpu" or "reference".

    Raises:
        ValueError: no backend has this name.
        RuntimeError: it cannot run here.
    """
    check_name(name, "use_backend")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def requested(preferred: str | None = None) -> str | None:
    """The backend that was asked for, or None: `use_backend`, then `preferred`, then DTOKD_BACKEND.

    Raises:
        ValueError, RuntimeError: as `check_name`.
    """
    if name := _forced.get():
        check_name(name, "use_backend")
    elif name := preferred:
        check_name(name, "backend")
    elif name := os.environ.get("DTOKD_BACKEND"):
        check_name(name, "DTOKD_BACKEND")
    return name or None


def select(device: torch.device, preferred: str | None = None) -> Implementation:
    """The implementation for tensors on `device`.

    Args:
        device: where the gradients are.
        preferred: a backend's name, used unless `use_backend` has set another.

    Raises:
        ValueError: no backend has the name asked for.
        RuntimeError: it cannot run here or not on this device.
    """
    name = requested(preferred) or best(device)
    backend = _BACKENDS[name]
    if backend.device not in (None, device.type):
        raise RuntimeError(f"backend {name!r} cannot run on {device}; use 'reference' or leave the choice open")
    return backend.implementation()


def best(device: torch.device) -> str:
    """The name of the fastest backend that can run on `device`."""
    return next(
        name
        for name, backend in _BACKENDS.items()
        if backend.device in (None, device.type) and backend.automatic and backend.missing() is None
    )


def backend_info() -> dict[str, str]:
    """What was built, what is chosen, and why.

    Returns:
        For each backend "available" or why it is not; "chosen for cpu" and "chosen for cuda"; "instructions",
        the vector instructions that the CPU kernels use; "torch", its version.
    """
    info = {name: missing(name) or "available" for name in NAMES}
    name = requested()
    why = "forced by use_backend or DTOKD_BACKEND" if name else "best available"
    for device in ("cpu", "cuda"):
        info[f"chosen for {device}"] = f"{name or best(torch.device(device))} ({why})"
    info["instructions"] = libraries.instructions()
    info["torch"] = torch.__version__
    return info
