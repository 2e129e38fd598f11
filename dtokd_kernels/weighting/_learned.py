"""Numbers that AdamW learns inside a weighting: its memory, and one step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ._arguments import check_number
from .stateful import Memory


def start(values: Tensor) -> Memory:
    """The memory of numbers [K] float64 that have taken no step: "learned" and AdamW's state, named as torch's."""
    return {
        "learned": values,
        "exp_avg": torch.zeros_like(values),
        "exp_avg_sq": torch.zeros_like(values),
        "step": values.new_zeros((), dtype=torch.float32),
    }


def descend(memory: Memory, gradient: Tensor, *, lr: float, weight_decay: float) -> Memory:
    """The memory after one step of torch's AdamW, with its other defaults."""
    new = {name: memory[name].clone() for name in ("learned", "exp_avg", "exp_avg_sq", "step")}
    adamw(
        [new["learned"]],
        [gradient],
        [new["exp_avg"]],
        [new["exp_avg_sq"]],
        [],
        [new["step"]],
        fused=True,
        lr=lr,
        beta1=0.9,
        beta2=0.999,
        weight_decay=weight_decay,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )
    return {**memory, **new}


def check(op: str, lr: float, weight_decay: float) -> None:
    """Refuse a learning rate or weight decay that has no meaning.

    Raises:
        ValueError: names which, and what it may be.
    """
    check_number(op, "lr", lr, 0, "a number that is not negative, such as 0.025")
    check_number(op, "weight_decay", weight_decay, 0, "a number that is not negative, such as 0.01")
