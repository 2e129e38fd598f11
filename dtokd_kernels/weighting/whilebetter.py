"""A weight for distillation that is the part of the student's errors that the teacher does not make."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from ._arguments import check_number
from ._measured import Observing
from .stateful import Memory, choose


@dataclass(eq=False)
class WhileBetter(Observing):
    """Distillation has as much weight as there is to learn from the teacher, and none once it is no longer better.

    Now and then `observe` is given the student's and the teacher's error on the same samples that are not trained on.
    With their averages e_s and e_t over the calls, which decay by `beta`, the weights of the log-loss gradients are

        w_p = 1 - g and w_i = g / (K - 1),   g = max(0, 1 - e_t / e_s),

    for the primary (task) objective p and the K - 1 others i. g is the part of the student's errors that the teacher
    does not make: near 1 at the start, smaller while the student comes closer, 0 for a teacher that errs more than the
    student. Before the first call the primary objective alone is trained. No loss's unit or constant factor matters.

    The errors may be any numbers that are 0 at best and lower for the better model: error rates, or a detector's
    1 - AP. The rule does not notice a good teacher that this student cannot follow.

    Source: this package. That distillation should end when the student no longer gains from it: Cho and Hariharan,
    *On the Efficacy of Knowledge Distillation*, ICCV 2019. docs/evidence.md compares the rule with tuned weights.

    Memory: "student" and "teacher", scalars: decaying sums of the errors.

    Args:
        primary: name or position of the task's objective.
        beta: part of the averages that stays in each call, from 0 to below 1.

    Raises:
        ValueError: a number outside its range; losses without the primary objective.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> rule = dk.weighting.WhileBetter("task", beta=0.0)
        >>> optimizer = dk.DTOAdamW([w], weighting=rule)
        >>> for student_error in (0.5, 0.1):
        ...     rule.observe(student=student_error, teacher=0.125)
        ...     optimizer.backward({"task": (w - 1).square().sum(), "distill": (w + 1).square().sum()})
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     print(optimizer.balance.weights)
        tensor([0.2500, 0.7500], dtype=torch.float64)
        tensor([1., 0.], dtype=torch.float64)
    """

    primary: str | int = 0
    beta: float = 0.8
    log_gradients: ClassVar[bool] = True
    _look = "observe(student=..., teacher=...)"

    def __post_init__(self) -> None:
        check_number("WhileBetter", "beta", self.beta, 0, "from 0 to below 1, such as 0.8", below=1)

    def initial(self, gram: Tensor) -> Memory:
        """Nothing compared yet."""
        zero = gram.new_zeros((), dtype=torch.float64)
        return {"student": zero, "teacher": zero.clone()}

    def advance(self, memory: Memory, gram: Tensor, losses: Tensor) -> tuple[Tensor, Memory]:
        """The weights after the last comparison."""
        K = len(gram)
        alone = self.alone(gram)
        if K == 1:
            return alone, memory
        student, teacher = memory["student"], memory["teacher"]
        gap = torch.where(teacher < student, 1 - teacher / student, 0.0)
        return (1 - gap) * alone + gap / (K - 1) * (1 - alone), memory

    @torch.no_grad()
    def observe(self, student: Tensor | float, teacher: Tensor | float) -> None:
        """Compare the two models.

        Args:
            student, teacher: their errors on the same held-out samples, scalars that are not negative. On several
                ranks pass averages. If one is not finite, or a tensor is negative, nothing changes.

        Raises:
            ValueError: one is neither a number nor a tensor of one, or, given as a number, negative.

        Effects: no host sync.
        """
        for name, value in (("student", student), ("teacher", teacher)):
            if (value.numel() != 1) if isinstance(value, Tensor) else (not isinstance(value, Real) or value < 0):
                raise ValueError(
                    f"WhileBetter.observe: {name} is {value!r}; pass an error as one number that is not negative"
                )
        device = next((value.device for value in (student, teacher) if isinstance(value, Tensor)), None)
        if self._memory is None:
            self._memory = self.initial(torch.eye(1, dtype=torch.float64, device=device))
        memory = self._memory
        # a number is filled in on the device: a copy of it would wait
        errors = {
            name: value.reshape(()).to(memory[name])
            if isinstance(value, Tensor)
            else torch.full_like(memory[name], value)
            for name, value in (("student", student), ("teacher", teacher))
        }
        both = torch.stack(list(errors.values()))
        usable = (both.isfinite() & (both >= 0)).all()
        new = {name: self.beta * memory[name] + (1 - self.beta) * errors[name] for name in memory}
        self._write(choose(~usable, memory, new))
        self._measurements += 1
