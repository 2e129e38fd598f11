"""The operations that torch sees: one schema each, which the CPU, CUDA and Triton implement.

The libraries in C++ register for the namespace `dtokd` and their device; Triton's kernels, which are for CUDA too, have
the same schemas in `dtokd_triton`. `prepare` checks parameters and state once and returns a number that stands for
them, until `release`: an update by that number writes to tensors that are not among its arguments.

Rows are as in `rows`: grads row by row, `reach` and `role` a number for each row. coefficients: [3, K] float64, by
role. losses_before, squares and roles of `balance`: as `reference.balance_before` has them, where the Gram matrices are
those of an earlier step. numbers: of each group those of the rule, in the order of `rules`; lr_of: of each group the
index in `lrs` of a tensor that is its learning rate, or -1. tickets: [4] int32 zeros, which launches on a GPU share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .types import Role

_OPTIONS = "bool log_gradients, bool clamp, bool rescale_sum, float max_norm, float loss_floor, float limit"
_ROWS = "Tensor[] grads, int[] reach, int[] role"
_NUMBERS = "Tensor[] lrs, int[] lr_of, float[] numbers"
_TICKETS = "Tensor(a!)? tickets"

#: By name: arguments and what is returned.
SCHEMAS = {
    "gram": f"({_ROWS}, int K, {_TICKETS}) -> Tensor",
    "min_norm_weights": "(Tensor gram, bool clamp, Tensor? present) -> Tensor",
    "balance": "(Tensor grams, Tensor losses, Tensor? weights, Tensor? losses_before, Tensor? squares, int roles, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    "gram_balance": f"({_ROWS}, Tensor losses, {_OPTIONS}, {_TICKETS}) -> (Tensor, Tensor, Tensor)",
    "combine_": "(Tensor(a!)[] out, Tensor[] grads, int[] reach, int[] role, Tensor coefficients) -> ()",
    "prepare": "(int rule, Tensor[] params, Tensor[] state, int[] reach, int[] role, int[] group, int[] held) -> int",
    "release": "(int prepared, Tensor like) -> ()",
    "update_": f"(int prepared, Tensor[] grads, Tensor coefficients, Tensor skipped, {_NUMBERS}, bool measure, "
    f"{_TICKETS}) -> Tensor",
    "resident_": f"(int prepared, Tensor[] grads, Tensor losses, {_OPTIONS}, {_NUMBERS}, {_TICKETS}) -> "
    "(Tensor, Tensor, Tensor)",
    "instructions": "(Tensor like) -> Tensor",
}


def values_size(K: int) -> int:
    """How many numbers an operation `balance` returns for K objectives."""
    return 5 * K + K * K + 1


def _numbers(like: Tensor, *size: int) -> Tensor:
    return like.new_empty(size, dtype=torch.float64)


def _grams(like: Tensor, K: int) -> Tensor:
    return _numbers(like, len(Role), K, K)


def _record(losses: Tensor) -> tuple[Tensor, Tensor]:
    return _numbers(losses, values_size(len(losses))), losses.new_empty(2, dtype=torch.bool)


#: What each returns, for torch.compile and opcheck: shapes without values, from the arguments by name.
_FAKES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "gram": lambda a: _grams(a["grads"][0], a["K"]),
    "min_norm_weights": lambda a: _numbers(a["gram"], len(a["gram"])),
    "balance": lambda a: _record(a["losses"]),
    "gram_balance": lambda a: (_grams(a["grads"][0], len(a["losses"])), *_record(a["losses"])),
    "combine_": lambda a: None,
    "prepare": lambda a: 0,
    "release": lambda a: None,
    "update_": lambda a: (
        _grams(a["coefficients"], a["coefficients"].shape[1]) if a["measure"] else _numbers(a["coefficients"], 0)
    ),
    "resident_": lambda a: (_grams(a["grads"][0], len(a["losses"])), *_record(a["losses"])),
    "instructions": lambda a: a["like"].new_empty(8, dtype=torch.uint8),
}
_libraries: list[torch.library.Library] = []


def define(namespace: str) -> torch.library.Library:
    """Let torch know the operations, under a namespace; implementations are registered for devices."""
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        names = [argument.name for argument in getattr(getattr(torch.ops, namespace), name).default._schema.arguments]

        def fake(*args: Any, names: list[str] = names, fake: Any = _FAKES[name], **kwargs: Any) -> Any:
            return fake(dict(zip(names, args, strict=False)) | kwargs)

        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    _libraries.append(library)  # which would take its operations with it
    return library
