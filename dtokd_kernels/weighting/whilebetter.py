"""A fixed weight for distillation, for as long as the teacher is better than the student."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._arguments import check_number
from ._names import check_primary, position_of
from .stateful import Memory, Stateful, choose

#: Steps without any comparison after which there is a warning.
PATIENCE = 100


@dataclass(eq=False)
class WhileBetter(Stateful):
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
    log_gradients: ClassVar[bool] = False
    needs_gram: ClassVar[bool] = False
    _steps = 0  # taken before the first call of `observe`
    _observed = False

    def __post_init__(self) -> None:
        for name, value, like in (("share", self.share, 0.7), ("margin", self.margin, 0.05), ("beta", self.beta, 0.5)):
            check_number("WhileBetter", name, value, 0, f"from 0 to below 1, such as {like}", below=1)

    def expect(self, names: tuple[str, ...]) -> None:
        """Take the names of the objectives whose losses come next.

        Raises:
            ValueError: the primary one is not among them, or they are not those of the memory.
        """
        check_primary("WhileBetter", self.primary, names)
        super().expect(names)

    def initial(self, gram: Tensor) -> Memory:
        """Nothing compared yet."""
        zero = gram.new_zeros((), dtype=torch.float64)
        return {"student": zero, "teacher": zero.clone()}

    def advance(self, memory: Memory, gram: Tensor, losses: Tensor) -> tuple[Tensor, Memory]:
        """The weights after the last comparison."""
        K = len(gram)
        alone = torch.arange(K, device=gram.device) == position_of("WhileBetter", self.primary, self._expected, K)
        others = torch.full_like(gram[0], self.share / max(K - 1, 1), dtype=torch.float64)
        listening = torch.where(alone, 1.0 - self.share if K > 1 else 1.0, others)
        better = memory["teacher"] < (1 - self.margin) * memory["student"]
        return torch.where(better, listening, alone.double()), memory

    def commit(self, skipped: Tensor) -> None:
        """Take over what the last call proposed; warn once if many steps were taken without a comparison."""
        super().commit(skipped)
        if self._observed:
            return
        self._steps += 1
        if self._steps == PATIENCE:
            warnings.warn(
                f"WhileBetter: student and teacher were not compared in {PATIENCE} steps, and the primary objective "
                "alone was trained; call observe(student=..., teacher=...) every few steps",
                stacklevel=2,
            )

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
        errors = {
            name: torch.as_tensor(value).detach().reshape(()).to(memory[name])
            for name, value in (("student", student), ("teacher", teacher))
        }
        usable = torch.stack(list(errors.values())).isfinite().all()
        new = {name: self.beta * memory[name] + (1 - self.beta) * errors[name] for name in memory}
        self._write(choose(~usable, memory, new))
        self._observed = True

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; from an empty one, start anew.

        Raises:
            ValueError: it is another weighting's state. Nothing has changed then.
        """
        super().load_state_dict(state)
        self._steps, self._observed = 0, self._memory is not None and any(v > 0 for v in self._memory.values())
