"""Refusals of the weightings' constructors, and the numbers that they take as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def check_number(op: str, name: str, value: Any, low: float, expected: str, *, below: float = math.inf) -> None:
    """Refuse what is not a number in [low, below).

    Args:
        op: the class.
        name: of the argument.
        value: what the user gave.
        low: the smallest number allowed.
        expected: follows "pass".
        below: the numbers allowed are less than this.

    Raises:
        ValueError: names the value, and what it may be.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= float(value) < below:
        raise ValueError(f"{op}: {name} is {value!r}; pass {expected}")


def check_seed(op: str, seed: Any) -> None:
    """Refuse what is not an integer.

    Raises:
        TypeError: names the value.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"{op}: seed is {seed!r}; pass an integer, such as 0")


def check_steps(op: str, name: str, steps: Any) -> None:
    """Refuse what is no positive number of steps.

    Raises:
        ValueError: names the value.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"{op}: {name} is {steps!r}; pass a positive number of steps, or None")


def filled(values: Sequence[float], like: Tensor) -> Tensor:
    """[K] float64 of K numbers, filled on the device: a tensor made of a list would be copied there, which waits."""
    return torch.stack([like.new_full((), value, dtype=torch.float64) for value in values])
