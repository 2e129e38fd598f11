"""Shares of the gradient's norm: each objective gets the part of the update that the user names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._arguments import check_number, check_steps, filled
from ._names import check_primary, ordered, position_of
from .stateful import Memory, Stateful


@dataclass(eq=False)
class Share(Stateful):
    """Weights that give each weighted gradient a given share of the sum of the norms, averaged over the steps.

    With n_i the averaged norm of objective i's gradient, and s_i its share,

        w_i = s_i T / n_i.

    T is the sum of the n_i, so that shares which the gradients have anyway make all weights 1, and a learning rate that
    was tuned for a sum of the losses keeps its meaning. A number fixes T (on average the direction is no longer than
    that). With `primary`, T is such that this objective's weight is 1, and the others are measured against it.

    The average corrects for its start, as Adam's moments do: n_i(t) = sum_s beta^(t-s) n_i(s) / sum_s beta^(t-s), over
    the steps in which the objective has a gradient. With beta = 0 each step has exactly these shares.

    What it guarantees: multiplying a loss by a constant changes nothing (but T, where it is the sum of the n_i), and no
    objective has more than its share. It does not look at the angles between gradients.

    Where the norms are measured is the choice of `gram=`: at all shared parameters, at a `Probe` (the last layer, as
    VQGAN does), or at a `Feature` (the model's output, as EnCodec does). `Every(n, ...)` measures now and then.

    Source: EnCodec (Defossez et al., 2022), section 3.4, audiocraft's `Balancer`: shares at the model's output, T = 1,
    beta = 0.999; VQGAN (Esser et al., CVPR 2021), Eq. 7: equal norms at the last layer, beta = 0, `primary` the
    reconstruction; RT-DETRv4 (2025): the share of the distillation loss as the set point.

    With `freeze_after` the weights are constants after that many steps, and each step takes one backward pass of the
    weighted sum, whatever `gram=` was. Steps that were skipped count too, as the host does not read that; but no
    weight is frozen before each objective's gradient was measured: for this the host reads the memory, normally once.

    Memory: "norms" [K], the sums, and "counts" [K], what they are divided by; "steps", how many were taken; "frozen".

    Args:
        shares: one positive number for each objective, or a dict from their names; they sum to 1. With `primary`
            any positive numbers: ratios of norms, such as {"task": 1, "distill": 0.3}. None for equal shares.
        beta: part of the average that stays in each step, from 0 to below 1.
        total: T; None for the sum of the averaged norms.
        primary: name or position of an objective whose weight is 1.
        freeze_after: steps; None for never.
        log_gradients: take the norms of the gradients of log L_i instead of those of L_i.

    Raises:
        TypeError, ValueError: shares that are not positive, do not sum to 1, or name other objectives than there are;
            beta outside its range; a `total` that is not positive, or beside `primary`; a `freeze_after` that is no
            positive number of steps.

    Example:
        >>> import torch
        >>> from dtokd_kernels import weighting
        >>> rule = weighting.Share([0.75, 0.25], beta=0.0, total=1.0)
        >>> rule(torch.diag(torch.tensor([4.0, 100.0], dtype=torch.float64)), torch.ones(2))  # norms 2 and 10
        tensor([0.3750, 0.0250], dtype=torch.float64)
    """

    shares: Sequence[float] | Mapping[str, float] | None = None
    beta: float = 0.99
    total: float | None = None
    primary: str | int | None = None
    freeze_after: int | None = None
    log_gradients: bool = False
    _steps: int = field(default=0, init=False, repr=False)
    _frozen: bool = field(default=False, init=False, repr=False)
    _saved = ("steps", "frozen")

    def __post_init__(self) -> None:
        given: Any = [1.0] if self.shares is None else self.shares
        example = "a positive number for each objective, such as {'task': 0.75, 'distill': 0.25}"
        try:
            values = list(given.values() if isinstance(given, Mapping) else given)
        except TypeError as error:
            raise TypeError(f"Share: shares is {self.shares!r}; pass {example}") from error
        if not values:
            raise ValueError(f"Share: shares is {self.shares!r}; pass {example}")
        for value in values:
            check_number("Share", "a share", value, math.ulp(0.0), example)
        if self.primary is None and abs(sum(values) - 1) > 1e-6:
            raise ValueError(
                f"Share: shares sum to {sum(values):g}; pass shares that sum to 1, or name the objective that the "
                "others are measured against: primary='task'"
            )
        check_number("Share", "beta", self.beta, 0, "from 0 to below 1, such as 0.99", below=1)
        if self.total is not None:
            check_number("Share", "total", self.total, math.ulp(0.0), "a positive number, or None")
        if self.total is not None and self.primary is not None:
            raise ValueError("Share: total and primary both fix the size of the step; pass one of them")
        if self.freeze_after is not None:
            check_steps("Share", "freeze_after", self.freeze_after)
        if isinstance(self.primary, str) and isinstance(self.shares, Mapping) and self.primary not in self.shares:
            raise ValueError(f"Share: primary is {self.primary!r}; choose one of {list(self.shares)}")

    def expect(self, names: tuple[str, ...]) -> None:
        """Take the names of the objectives whose losses come next.

        Raises:
            ValueError: they are not those of `shares` and `primary`, or not those of the memory.
        """
        if self.shares is not None:
            ordered("Share", "shares", self.shares, names, len(names))
        if self.primary is not None:
            check_primary("Share", self.primary, names)
        super().expect(names)

    def initial(self, gram: Tensor) -> Memory:
        """Nothing measured yet."""
        zeros = gram.new_zeros(len(gram), dtype=torch.float64)
        return {"norms": zeros, "counts": zeros.clone()}

    def advance(self, memory: Memory, gram: Tensor, losses: Tensor) -> tuple[Tensor, Memory]:
        """The weights and the memory after them."""
        shares, primary = self._of(len(gram), gram)
        norms = gram.diagonal().sqrt()
        present = norms > 0
        if self.frozen:  # what is there instead of a Gram matrix is no measurement
            present = torch.zeros_like(present)
        summed = torch.where(present, self.beta * memory["norms"] + norms, memory["norms"])
        counts = torch.where(present, self.beta * memory["counts"] + 1, memory["counts"])
        average = torch.where(counts > 0, summed / counts, 0.0)
        inverse = torch.where(average > 0, 1 / average, 0.0)
        if primary is not None:
            total = average[primary] / shares[primary]
        else:
            total = average.sum() if self.total is None else average.new_full((), self.total)
        return shares * total * inverse, {"norms": summed, "counts": counts}

    @property
    def frozen(self) -> bool:
        """Whether `freeze_after` steps were taken, and all gradients measured."""
        return self._frozen

    def commit(self, skipped: Tensor) -> None:
        """Take over what the last call proposed, and count the step."""
        super().commit(skipped)
        if self._memory is None or self._frozen or self.freeze_after is None:
            return
        self._steps += 1
        if self._steps >= self.freeze_after:
            counts = self._memory["counts"]
            capturing = counts.is_cuda and torch.cuda.is_current_stream_capturing()
            self._frozen = not capturing and bool((counts > 0).all())

    def _of(self, K: int, like: Tensor) -> tuple[Tensor, int | None]:
        """The shares [K] on the device, in the objectives' order, and the position of the primary one."""
        names = self._expected
        values = [1 / K] * K if self.shares is None else ordered("Share", "shares", self.shares, names, K)
        primary = None if self.primary is None else position_of("Share", self.primary, names, K)
        return filled(values, like), primary
