"""A fixed weight for distillation, for as long as the teacher is better than the student."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._arguments import check_number
from ._measured import Observing
from .stateful import Memory, choose


@dataclass(eq=False)
class WhileBetter(Observing):
    """The share of distillation is constant while the teacher is better on held-out samples, and 0 where it is not.

    Now and then `observe` is given the student's and the teacher's error on the same samples that are not trained on.
    With their averages e_s and e_t over the calls, which decay by `beta`, the weights of the raw gradients are

        w_p = 1 - share and w_i = share / (K - 1)   while e_t < (1 - margin) e_s,
        w_p = 1         and w_i = 0                 otherwise,

    for the primary (task) objective p and the others i. A teacher that knows less than the student, or nothing, is not
    listened to; one that is overtaken is left. Before the first call the primary objective alone is trained.

    The error may be any number that is lower for the better model and not negative: an error rate (an accuracy counts
    in the same way for every model) or a cross-entropy (which also punishes a teacher that is badly calibrated). What
    is not seen: a good teacher that this student cannot follow. The default share did best among untuned constants in
    docs/evidence.md.

    This package; that distillation should end when the student no longer gains from it: Cho and Hariharan, *On the
    Efficacy of Knowledge Distillation*, ICCV 2019.

    Memory: "student" and "teacher", scalars: decaying sums of the errors.

    Args:
        primary: name or position of the task's objective.
        share: of all other objectives together, from 0 to below 1.
        margin: by which part the teacher's error has to be lower than the student's, from 0 to below 1.
        beta: what the averages keep per call, from 0 to below 1.

    Raises:
        ValueError: a number outside its range; losses without the primary objective.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> rule = dk.weighting.WhileBetter("task", share=0.75, beta=0.0)
        >>> optimizer = dk.DTOAdamW([w], weighting=rule)
        >>> for student_error in (0.5, 0.1):
        ...     rule.observe(student=student_error, teacher=0.2)
        ...     optimizer.backward({"task": (w - 1).square().sum(), "distill": (w + 1).square().sum()})
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     print(optimizer.balance.weights)
        tensor([0.2500, 0.7500], dtype=torch.float64)
        tensor([1., 0.], dtype=torch.float64)
    """

    primary: str | int = 0
    share: float = 0.7
    margin: float = 0.05
    beta: float = 0.5
    _look = "observe(student=..., teacher=...)"

    def __post_init__(self) -> None:
        for name, value, like in (("share", self.share, 0.7), ("margin", self.margin, 0.05), ("beta", self.beta, 0.5)):
            check_number("WhileBetter", name, value, 0, f"from 0 to below 1, such as {like}", below=1)

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
        better = memory["teacher"] < (1 - self.margin) * memory["student"]
        listening = (1 - self.share) * alone + self.share / (K - 1) * (1 - alone)
        return torch.where(better, listening, alone), memory

    @torch.no_grad()
    def observe(self, student: Tensor | float, teacher: Tensor | float) -> None:
        """Compare the two models.

        Args:
            student, teacher: their errors on the same held-out samples, scalars that are not negative. On several
                ranks pass averages. If one is not finite nothing changes.

        Raises:
            ValueError: one is no scalar, or, given as a number, negative.

        Effects: no host sync.
        """
        for name, value in (("student", student), ("teacher", teacher)):
            if (value.numel() != 1) if isinstance(value, Tensor) else value < 0:
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
        usable = torch.stack(list(errors.values())).isfinite().all()
        new = {name: self.beta * memory[name] + (1 - self.beta) * errors[name] for name in memory}
        self._write(choose(~usable, memory, new))
        self._measurements += 1
