"""Whose solver a weighting's formula is computed by: the one in torch's operations, or the backend's own.

A solver is a function from a Gram matrix and numbers to weights. It is written once, in torch's operations, beside its
weighting; that one runs on any device. A backend that has a function of the same name takes its place wherever the
backend calls weightings.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import ParamSpec

from torch import Tensor

_P = ParamSpec("_P")

_backend: ContextVar[object] = ContextVar("dtokd_solvers", default=None)


@contextlib.contextmanager
def solved_by(backend: object) -> Iterator[None]:
    """Let a backend solve what the weightings called in this block ask for, as far as it can."""
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def solver(function: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Mark a function in torch's operations that a backend may have its own of."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        solve = getattr(_backend.get(), function.__name__, function)
        return solve(*args, **kwargs)

    return run
