"""Finding what makes the host wait for the device: a weighting that reads the Gram matrix on the host."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name

#: Functions that wait for a CUDA device: they give the host a number, or a shape or an error that depends on numbers.
SYNCS = frozenset(
    [f"torch.Tensor.{n}" for n in ("item", "tolist", "numpy", "cpu", "nonzero", "equal", "allclose", "masked_select")]
    + [f"torch.Tensor.__{n}__" for n in ("bool", "float", "int", "index", "complex", "contains", "array")]
    + [f"torch.{n}" for n in ("is_nonzero", "nonzero", "equal", "allclose", "masked_select", "unique", "argwhere")]
    + [f"torch.linalg.{n}" for n in ("solve", "inv", "cholesky", "eigh", "eigvalsh", "eig", "eigvals", "lstsq", "pinv")]
)

_warns: ContextVar[bool] = ContextVar("dtokd_warn_on_sync", default=False)


class SyncWarning(UserWarning):
    """A weighting makes the host wait for the device in every step."""


@contextlib.contextmanager
def warn_on_sync() -> Iterator[None]:
    """Warn when a weighting waits for the device, on the CPU as well, where that would cost nothing.

    What torch's functions are known to wait for is seen on any device (`SYNCS`); on CUDA torch also reports what else
    it waits for (`torch.cuda.set_sync_debug_mode`). `SyncWarning` shows the line.

    Example:
        >>> import torch, warnings, dtokd_kernels as dk
        >>> def larger_half(gram):
        ...     first = 0.7 if gram[0, 0] > gram[1, 1] else 0.3
        ...     return torch.tensor([first, 1 - first])
        >>> with dk.debug.warn_on_sync(), warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     _ = dk.balance(torch.eye(2), [1.0, 1.0], larger_half)
        >>> caught[0].category.__name__
        'SyncWarning'
    """
    token = _warns.set(True)
    try:
        yield
    finally:
        _warns.reset(token)


@contextlib.contextmanager
def watch(weighting: object) -> Iterator[None]:
    """Where a weighting is called: does nothing outside `warn_on_sync`."""
    if not _warns.get():
        yield
        return
    before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else None
    if before is not None:
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with _Watch(weighting):
            yield
    finally:
        if before is not None:
            torch.cuda.set_sync_debug_mode(before)


class _Watch(TorchFunctionMode):
    def __init__(self, weighting: object) -> None:
        super().__init__()
        self._weighting = weighting

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = resolve_name(func)
        if name in SYNCS or (name == "torch.Tensor.__getitem__" and _masks(args[1])):
            warnings.warn(
                f"weighting {self._weighting!r} calls {name}, which makes the host wait for the device in every step; "
                "decide with tensors (torch.where, clamp, linalg.solve_ex) instead",
                SyncWarning,
                stacklevel=_level_of_caller(),
            )
        return func(*args, **(kwargs or {}))


def _masks(index: object) -> bool:
    """Whether an index selects as many elements as a mask has ones."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


def _level_of_caller() -> int:
    """`stacklevel` of the code that called torch, for a warning two frames below it or deeper in torch itself."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(str(Path(torch.__file__).parent)):
        level, frame = level + 1, frame.f_back
    return level
