"""Which implementation of the operations runs, and why.

A backend is a module with the functions of `Implementation`. Choosing one is the only thing decided here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import cuda, native, reference
from .types import Balance, Options, Update


class Implementation(Protocol):
    """What a backend's module has: functions with the names and meanings of those in `reference`.

    It may also have

        gram_balance(groups, losses, options) -> Balance: `gram` of all roles and `balance` at once;
        run_step(updates, losses, options) -> Balance | None: a whole step at once; None, with nothing changed, where
            it does not fit.
    """

    def gram(self, grads: Sequence[Sequence[Tensor]], /) -> Tensor:
        """[K, K] of K lists without None, of one dtype and device."""

    def min_norm_weights(self, gram: Tensor, clamp: bool = True, present: Tensor | None = None) -> Tensor:
        """[K] from [K, K]."""

    def balance(self, grams: Tensor, losses: Tensor, options: Options) -> Balance:
        """From the Gram matrices [3, K, K] by role to coefficients."""

    def combine(
        self, grads: Sequence[Sequence[Tensor]], coefficients: Tensor, out: Sequence[Tensor] | None = None, /
    ) -> list[Tensor]:
        """The combination of K lists as for `gram`."""

    def run_updates(self, updates: Sequence[Update], table: Tensor, skipped: Tensor) -> None:
        """Updates on one device, in the order in which memory should be walked."""

    def measure_and_update(self, updates: Sequence[Update], table: Tensor, skipped: Tensor) -> Tensor:
        """The same, and [3, K, K] of their gradients."""


@dataclass(frozen=True)
class Backend:
    """An implementation of the operations.

    Attributes:
        module: returns it; called when it is first used.
        device: the type of device that its tensors are on; None: any.
        missing: why it cannot run here, or None if it can.
        automatic: used without being asked for. (Interpreted kernels are not.)
    """

    module: Callable[[], Implementation]
    device: str | None
    missing: Callable[[], str | None]
    automatic: bool = True


def _cuda_missing() -> str | None:
    return cuda.missing or (None if torch.cuda.is_available() else "torch sees no CUDA device")


@functools.cache
def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no GPU, and TRITON_INTERPRET=1 is not set"
    return None


def _triton() -> Implementation:
    from . import triton  # triton itself is imported only when it is used

    return triton


@functools.cache
def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors: decided by TRITON_INTERPRET, once a process."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


#: By name, the fastest first.
_BACKENDS: dict[str, Backend] = {
    "cuda": Backend(lambda: cuda, "cuda", _cuda_missing),
    "triton": Backend(_triton, "cpu" if interpreted() else "cuda", _missing_triton, automatic=not interpreted()),
    "cpu": Backend(lambda: native, "cpu", lambda: native.missing),
    "reference": Backend(lambda: reference, None, lambda: None),
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
        RuntimeError: it exists, but cannot run here; says why.
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
        preferred: a backend's name, obeyed unless `use_backend` says otherwise.

    Raises:
        ValueError: no backend has the name asked for.
        RuntimeError: it cannot run here or not on this device.
    """
    name = requested(preferred) or best(device)
    backend = _BACKENDS[name]
    if backend.device not in (None, device.type):
        raise RuntimeError(f"backend {name!r} cannot run on {device}; use 'reference' or leave the choice open")
    return backend.module()


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
    info["instructions"] = native.instructions()
    info["torch"] = torch.__version__
    return info
