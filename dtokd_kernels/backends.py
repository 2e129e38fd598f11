"""Which implementation of the operations runs, and why.

A backend is a module with the functions of `reference`: gram, min_norm_weights, balance, combine, adamw_step,
sgd_step. Choosing one is the only thing decided here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch

from . import native, reference

NAMES = ("cuda", "triton", "cpu", "reference")

_forced: ContextVar[str | None] = ContextVar("dtokd_backend", default=None)


def missing(name: str) -> str | None:
    """Why a backend cannot run here, or None if it can."""
    if name == "cpu":
        return native.missing
    if name in ("cuda", "triton"):
        return "this version has no GPU kernels; GPU tensors run through 'reference'"
    return None


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
    for name, source in (
        (_forced.get(), "use_backend"),
        (preferred, "backend"),
        (os.environ.get("DTOKD_BACKEND"), "DTOKD_BACKEND"),
    ):
        if name:
            check_name(name, source)
            return name
    return None


def select(device: torch.device, preferred: str | None = None) -> ModuleType:
    """The implementation for tensors on `device`.

    Args:
        device: where the gradients are.
        preferred: a backend's name, obeyed unless `use_backend` says otherwise.

    Raises:
        ValueError: no backend has the name asked for.
        RuntimeError: it cannot run here or not on this device.
    """
    name = requested(preferred)
    if name is None:
        name = "cpu" if device.type == "cpu" and native.missing is None else "reference"
    if name == "reference":
        return reference
    if device.type != "cpu":
        raise RuntimeError(f"backend 'cpu' cannot run on {device}; use 'reference' or leave the choice open")
    return native


def backend_info() -> dict[str, str]:
    """What was built, what is chosen, and why.

    Returns:
        For each backend "available" or why it is not; "chosen for cpu" and "chosen for cuda"; "instructions",
        the vector instructions that the CPU kernels use; "torch", its version.
    """
    info = {name: missing(name) or "available" for name in NAMES}
    name = requested()
    why = "forced by use_backend or DTOKD_BACKEND" if name else "best available"
    info["chosen for cpu"] = f"{name or ('cpu' if native.missing is None else 'reference')} ({why})"
    info["chosen for cuda"] = f"{name or 'reference'} ({why})"
    info["instructions"] = native.instructions()
    info["torch"] = torch.__version__
    return info
