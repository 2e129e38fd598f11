"""What the operations return, for torch.compile and opcheck: shapes without values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .fused import values_size
from .types import Role


def _weights(a: dict[str, Any]) -> Tensor:
    return _numbers(a["gram"], len(a["gram"]))


def _gram(a: dict[str, Any]) -> Tensor:
    return _numbers(a["grads"][0], a["K"], a["K"])


def _products(a: dict[str, Any]) -> Tensor:
    R = len(a["coefficients"])
    return _numbers(a["coefficients"], R, R)


def _grams(a: dict[str, Any]) -> Tensor:
    K = a["K"] if "K" in a else a["table"].shape[1] if "table" in a else len(a["losses"])
    return _numbers(a["grads"][0], len(Role), K, K)


def _record(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    like = a["losses"]
    return _numbers(like, values_size(len(like))), like.new_empty(2, dtype=torch.bool)


def _nothing(a: dict[str, Any]) -> None:
    return None


def _numbers(like: Tensor, *size: int) -> Tensor:
    return like.new_empty(size, dtype=torch.float64)


#: By the operation's name: from its arguments by name to what it returns.
_RETURNS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "gram": _gram,
    "gram_by_role": _grams,
    "gram_balance": lambda a: (_grams(a), *_record(a)),
    "min_norm_weights": _weights,
    "balance": _record,
    "balance_by_role": _record,
    "combine_": _nothing,
    "adamw_step_": _nothing,
    "sgd_step_": _nothing,
    "adamw_updates_": _nothing,
    "sgd_updates_": _nothing,
    "gram_adamw_step_": _products,
    "gram_sgd_step_": _products,
    "gram_adamw_updates_": _grams,
    "gram_sgd_updates_": _grams,
    "resident_adamw_": lambda a: (_grams(a), *_record(a)),
}


def register(namespace: str) -> None:
    """Say it of the operations that a namespace has."""
    operations = getattr(torch.ops, namespace)
    for name, returns in _RETURNS.items():
        if hasattr(operations, name):
            names = [argument.name for argument in getattr(operations, name).default._schema.arguments]

            def fake(*args: Any, names: list[str] = names, returns: Any = returns, **kwargs: Any) -> Any:
                return returns(dict(zip(names, args, strict=False)) | kwargs)

            torch.library.register_fake(f"{namespace}::{name}", fake)
