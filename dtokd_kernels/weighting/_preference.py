"""How much each objective counts, by the user's wish."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import check_number


def check_preference(rule: str, preference: Sequence[float] | None) -> None:
    """Refuse what is no list of numbers that are not negative, with a positive one among them.

    Raises:
        TypeError, ValueError: names the argument and the remedy.
    """
    if preference is None:
        return
    if isinstance(preference, (str, Tensor)) or not isinstance(preference, Sequence):
        raise TypeError(
            f"{rule}: preference is {preference!r}; pass a list of numbers, one for each objective, such as [0.7, 0.3]"
        )
    for i, value in enumerate(preference):
        check_number(rule, f"preference[{i}]", value, 0, "a finite number that is not negative", below=math.inf)
    if not any(preference):
        raise ValueError(f"{rule}: preference is {preference!r}; one number must be positive")


def preference_of(rule: str, preference: Sequence[float] | None, default: float, like: Tensor) -> Tensor:
    """The preference [K] float64 on the device of the Gram matrix `like` [K, K]; `default` for each if there is none.

    Raises:
        ValueError: there are not K numbers.
    """
    K = len(like)
    values = [default] * K if preference is None else list(preference)
    if len(values) != K:
        raise ValueError(f"{rule}: preference has {len(values)} numbers for {K} objectives; give one each")
    # filled on the device: a tensor made of a list would be copied there, which waits for it
    return torch.stack([like.new_full((), value, dtype=torch.float64) for value in values])
