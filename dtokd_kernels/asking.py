"""How a weighting is called: with the losses or without them, and with copies if it is not one of this package."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .types import Weighting


def ask(weighting: Weighting, gram: Tensor, losses: Tensor) -> Any:
    """What a weighting makes of the matrix that it asks for."""
    arguments = [gram, losses] if takes_losses(weighting) else [gram]
    if not type(weighting).__module__.startswith(f"{__package__}."):
        arguments = [t.clone() for t in arguments]  # a user's function may write to them
    return weighting(*arguments)


def takes_losses(weighting: Weighting) -> bool:
    """Whether a weighting is called with (gram, losses) rather than with the Gram alone, as TorchJD's are."""
    called: Any = getattr(weighting, "forward", weighting)
    if inspect.isfunction(type(called).__call__):
        called = called.__call__
    if inspect.ismethod(called):
        return _takes_two(called.__func__, 1)
    return _takes_two(called, 0) if inspect.isfunction(called) else _takes_two.__wrapped__(called, 0)


@functools.lru_cache(maxsize=256)  # a signature takes longer than the balance of two objectives
def _takes_two(function: Callable[..., Any], bound: int) -> bool:
    """Whether a function takes two positional arguments after those that are bound."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[bound:]
    except ValueError:  # a builtin without a signature
        return True
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    return len(required) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
