"""Losses between logits: Hinton's KL, also of standardised ones, DeiT's distillation token, decoupled KD, DIST."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from .base import Objective
from .taps import Outputs, Taps

#: Added to variances.
SMALL = 1e-12


def soft_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch. Infimum 0, reached at equal logits.

    Source: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015; computed as `timm.task` does.

    Args:
        student, teacher: [B, classes].
        temperature: T > 0.
    """
    log_s = F.log_softmax(student.float() / temperature, dim=-1)
    log_t = F.log_softmax(teacher.float() / temperature, dim=-1)
    return kl(log_s, log_t) * temperature**2


def kl(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL(teacher || student) of distributions given by their logarithms, mean over the batch.

    That of nearly equal ones rounds to less than 0, which a divergence never is.
    """
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True).clamp_min(0)


class Hinton(Objective):
    """`soft_kl` between the class logits. Infimum 0."""

    def __init__(self, name: str, temperature: float) -> None:
        self.name, self.temperature = name, temperature
        self.student = self.teacher = Taps(logits=True)

    def loss(self, student: Outputs, projected: object, teacher: Outputs, target: Any) -> Tensor:
        """Of the logits alone, see `compare`."""
        assert student.logits is not None
        assert teacher.logits is not None
        return self.compare(student.logits, teacher.logits)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, of logits [B, classes]."""
        return soft_kl(student, teacher, self.temperature)


class Standardised(Hinton):
    """`soft_kl` between logits that are standardised for each sample: mean 0 and deviation 1 over the classes.

    Infimum 0, reached where the student's logits are the teacher's times a positive number plus another: the student
    need not have the teacher's scale. Source: Sun et al., *Logit Standardization in Knowledge Distillation*, CVPR 2024,
    Algorithm 1; their base temperature is 2.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, of logits [B, classes]."""
        return super().compare(standardised(student), standardised(teacher))


def standardised(logits: Tensor) -> Tensor:
    """Rows [B, classes] with mean 0 and, where they vary, deviation 1."""
    centred = logits - logits.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + SMALL).rsqrt()


class Dist(Hinton):
    """T^2 (1 - mean correlation over samples + 1 - mean correlation over classes) of softened predictions. Infimum 0.

    Reached where student and teacher differ by a positive factor and a constant in each row and each column of the
    batch's probabilities [B, classes]. The correlation over samples is that of the batch of each rank.

    Source: Huang et al., *Knowledge Distillation from A Stronger Teacher* (DIST), NeurIPS 2022, Eq. 8 and 9, both parts
    with the same weight, as there. Their temperature is 1 on ImageNet, 4 on CIFAR-100.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Both parts, of logits [B, classes]."""
        s, t = ((o.float() / self.temperature).softmax(-1) for o in (student, teacher))
        return (uncorrelated(s, t) + uncorrelated(s.mT, t.mT)) * self.temperature**2


def uncorrelated(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - the mean of Pearson's correlation of rows; that of a row without variation counts as 0."""
    s, t = (x - x.mean(-1, keepdim=True) for x in (student, teacher))
    # a correlation of equal rows may round above 1
    return (1 - F.cosine_similarity(s, t, dim=-1)).mean().clamp_min(0)


class Token(Objective):
    """The distillation head imitates the teacher: its distribution ("soft") or its decision ("hard"). Infimum 0.

    The hard loss is a cross-entropy with one label: it nears 0 and does not reach it. At evaluation the model averages
    its two heads, as timm's distilled DeiT does by itself.

    Source: Touvron et al., *Training data-efficient image transformers & distillation through attention*, ICML 2021,
    Eq. 2 and 3. Their code divides the soft loss by the number of classes too; here it is a mean over the batch, as in
    `timm.task`. With log-gradients a constant factor changes nothing.
    """

    def __init__(self, name: str, kind: str, temperature: float) -> None:
        self.name, self.kind, self.temperature = name, kind, temperature
        self.student = self.teacher = Taps(logits=True)

    def loss(self, student: Outputs, projected: object, teacher: Outputs, target: Any) -> Tensor:
        """Soft or hard.

        Raises:
            UsageError: the student returned one output instead of two.
        """
        assert teacher.logits is not None
        if student.token_logits is None:
            raise UsageError(
                "--kd-distill-type token: the student returned one output, not those of two heads; train mode is off, "
                "or set_distilled_training(False) was called"
            )
        if self.kind == "hard":
            return F.cross_entropy(student.token_logits.float(), teacher.logits.argmax(-1))
        return soft_kl(student.token_logits, teacher.logits, self.temperature)


class Decoupled(Objective):
    """alpha * KL between "target or not" + beta * KL among the other classes, both times T^2. Infimum 0.

    Source: Zhao et al., *Decoupled Knowledge Distillation*, CVPR 2022, Eq. 7. Their warm-up of the loss over 20 epochs
    is a schedule, not part of the loss, and left out: balancing decides its weight.
    """

    def __init__(self, name: str, temperature: float, alpha: float, beta: float) -> None:
        self.name, self.temperature, self.alpha, self.beta = name, temperature, alpha, beta
        self.student = self.teacher = Taps(logits=True)

    def loss(self, student: Outputs, projected: object, teacher: Outputs, target: Any) -> Tensor:
        """The two parts with their factors, as `Objective.loss`.

        Raises:
            UsageError: class probabilities as targets: there is no one target class to decouple.
        """
        assert student.logits is not None
        assert teacher.logits is not None
        if target.ndim != 1:
            raise UsageError(
                f"--kd-distill-type dkd: targets have shape {tuple(target.shape)}, but the loss needs one class each; "
                "switch off --mixup and --cutmix, or take --kd-distill-type logit"
            )
        return decoupled_kl(student.logits, teacher.logits, target, self.temperature, self.alpha, self.beta)


def decoupled_kl(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float, alpha: float, beta: float
) -> Tensor:
    """The loss of `Decoupled`. With alpha = 1 and beta = 1 - p_t(target) per sample it would be `soft_kl` (Eq. 6).

    Args:
        student, teacher: [B, classes].
        target: [B] class indices.
        temperature: T > 0.
        alpha, beta: weights of the two parts.
    """
    log_s = F.log_softmax(student.float() / temperature, dim=-1)
    log_t = F.log_softmax(teacher.float() / temperature, dim=-1)
    is_target = F.one_hot(target, student.shape[-1]).bool()

    def two_classes(log_p: Tensor) -> Tensor:
        # log sum of the others, not log(1 - p): that cancels where p nears 1
        others = log_p.masked_fill(is_target, -torch.inf).logsumexp(-1)
        return torch.stack([log_p[is_target], others], -1)

    def other_classes(logits: Tensor) -> Tensor:
        return F.log_softmax(logits.float()[~is_target].view(len(logits), -1) / temperature, dim=-1)

    binary = kl(two_classes(log_s), two_classes(log_t))
    others = kl(other_classes(student), other_classes(teacher))
    return (alpha * binary + beta * others) * temperature**2
