"""Losses between features: pooled, maps of several stages, attention transfer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from .base import Objective
from .phi import PhiS
from .projectors import MapProjector, PooledProjector
from .taps import Outputs, Taps

EPS = 1e-6


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    # a cosine of equal rows may round above 1
    return (1 - F.cosine_similarity(student, teacher, dim=1)).mean().clamp_min(0)


def row_norm(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of the L2 norm of a row's difference; channels are dimension 1.

    The norm is sqrt(|d|^2 + eps^2) - eps: 0 at equal rows, with a finite gradient there, which the plain norm has not.
    """
    return ((student - teacher).square().sum(1) + EPS**2).sqrt().sub(EPS).mean()


#: Each has infimum 0, reached at equal features (cosine: at equal directions). Channels are dimension 1.
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "smooth_l1": F.smooth_l1_loss,
    "cosine": _cosine,
    "norm": row_norm,
}


def normalise(student: Tensor, teacher: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Student's and teacher's features, [B, C] or [B, C, H, W], normalised by the rule `norm`.

    "layernorm" sets each position's channels of the teacher to mean 0 and variance 1 (VkD, classification: the student
    stays as it is). "standardize" does so per channel over batch and positions, on both sides (VkD, detection; theirs
    has no epsilon and divides by 0 at a dead channel). "phi-s" leaves both: `PhiS` has changed the teacher's before.

    Raises:
        UsageError: standardize of a single row: nothing would be left.
    """
    if norm == "layernorm":
        last = teacher.movedim(1, -1)
        return student, F.layer_norm(last, last.shape[-1:]).movedim(-1, 1)
    if norm == "standardize":
        if teacher.numel() == teacher.shape[1]:
            raise UsageError("--kd-feature-norm standardize: a batch of 1 has no spread; pass a larger --batch-size")
        return _standardise(student), _standardise(teacher)
    return student, teacher


def _standardise(x: Tensor) -> Tensor:
    rows = [0, *range(2, x.ndim)]
    return (x - x.mean(rows, keepdim=True)) * (x.var(rows, keepdim=True, unbiased=False) + EPS).rsqrt()


class Standardising(Objective):
    """What objectives on features have in common: with the norm "phi-s" the teacher's are standardised by a `PhiS`."""

    memory: PhiS | None = None

    def _set_norm(self, norm: str, widths: Sequence[int]) -> None:
        """Of `normalise`, and the teacher's widths."""
        self.norm = norm
        self.memory = PhiS(widths) if norm == "phi-s" else None

    def _features(self, teacher: Outputs) -> Sequence[Tensor]:
        """Those of the teacher that are standardised."""
        raise NotImplementedError

    def _targets(self, teacher: Outputs) -> Sequence[Tensor]:
        """What the student is compared with, before `normalise`."""
        features = [feature.float() for feature in self._features(teacher)]
        return features if self.memory is None else self.memory(features)

    def observe(self, teacher: Outputs) -> None:
        """See `Objective`."""
        if self.memory is not None:
            self.memory.observe(self._features(teacher))

    def settle(self) -> None:
        """See `Objective`."""
        if self.memory is not None:
            self.memory.settle()

    def remember(self, teacher: Outputs) -> None:
        """See `Objective`: where nothing was observed before training, the first batch gives the statistics."""
        if self.memory is not None and not self.memory.settled:
            self.observe(teacher)
            self.settle()


class Pooled(Standardising):
    """Distance between the projected pooled features and the teacher's. Infimum 0.

    With an orthogonal projector, layernorm and smooth_l1 it is the loss of VkD (Miles et al., CVPR 2024); with a linear
    one, no norm and mse that of `timm.task.FeatureDistillationTask`. Private: the projector.
    """

    def __init__(self, name: str, projector: str, widths: tuple[int, int], pool: str, norm: str, distance: str) -> None:
        self.name, self.distance, self.widths = name, DISTANCES[distance], widths
        self._set_norm(norm, widths[1:])
        self.head = PooledProjector(projector, *widths)
        self.student, self.teacher = Taps(logits=True, pooled=pool), Taps(pooled=pool)

    def loss(self, student: Outputs, projected: object, teacher: Outputs, target: Any) -> Tensor:
        """The distance between the projected and the teacher's pooled features, as `Objective.loss`.

        Raises:
            UsageError: the teacher's features have another width than the projector was made for.
        """
        assert isinstance(projected, Tensor)
        assert teacher.pooled is not None
        if projected.shape != teacher.pooled.shape:
            raise UsageError(
                f"--kd-distill-type feature: the projected student's features are {tuple(projected.shape)}, the "
                f"teacher's {tuple(teacher.pooled.shape)}; pass --kd-teacher-feature-dim {teacher.pooled.shape[-1]}"
            )
        (target_features,) = self._targets(teacher)
        return self.distance(*normalise(projected, target_features, self.norm))

    def _features(self, teacher: Outputs) -> Sequence[Tensor]:
        assert teacher.pooled is not None
        return [teacher.pooled]


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps averaged down to the smaller height and the smaller width. Averaging adds no detail nobody computed."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


class MultiScale(Standardising):
    """Mean over stages of the distance between projected maps and the teacher's, at the smaller size. Infimum 0.

    Source: Romero et al., *FitNets*, ICLR 2015, for one stage; normalised as VkD if asked. A transformer's map is its
    patch tokens on their grid, so CNN and ViT can teach each other; a detector's are its
    levels. Private: the projectors.
    """

    def __init__(
        self,
        name: str,
        projector: str,
        stages: tuple[tuple[int, ...], tuple[int, ...]],
        widths: tuple[list[int], list[int]],
        norm: str,
        distance: str,
    ) -> None:
        self.name, self.distance = name, DISTANCES[distance]
        self._set_norm(norm, widths[1])
        self.head = MapProjector(projector, *widths)
        self.student, self.teacher = Taps(logits=True, stages=stages[0]), Taps(stages=stages[1])

    def loss(self, student: Outputs, projected: object, teacher: Outputs, target: Any) -> Tensor:
        """The mean distance of the stages' maps, as `Objective.loss`."""
        assert isinstance(projected, list)
        return torch.stack(map_distances(projected, self._targets(teacher), self.norm, self.distance)).mean()

    def _features(self, teacher: Outputs) -> Sequence[Tensor]:
        return teacher.maps


def map_distances(
    student: Sequence[Tensor], teacher: Sequence[Tensor], norm: str, distance: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """The distances of pairs of maps [B, C, H, W], at the smaller size and normalised.

    Raises:
        UsageError: the teacher's have another width than the projectors were made for.
    """
    found = []
    for s, t in zip(student, teacher, strict=True):
        if s.shape[:2] != t.shape[:2]:
            raise UsageError(
                f"--kd-distill-type: the teacher's maps cannot be brought to the student's: it gives {t.shape[1]} "
                f"channels where it names {s.shape[1]}; choose other --kd-teacher-stages, or another teacher"
            )
        found.append(distance(*normalise(*same_size(s, t.float()), norm)))
    return found


class Attention(Objective):
    """Sum over stages of the mean squared difference of unit-length attention maps. Infimum 0. Nothing private.

    An attention map is the mean over channels of the squared activations, so widths need not agree. Source: Zagoruyko
    and Komodakis, *Paying More Attention to Attention*, ICLR 2017, Eq. 2 with p = 2; as their code, squared and
    averaged over positions.
    """

    def __init__(self, name: str, stages: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        self.name = name
        self.student, self.teacher = Taps(logits=True, stages=stages[0]), Taps(stages=stages[1])

    def loss(self, student: Outputs, projected: object, teacher: Outputs, target: Any) -> Tensor:
        """The sum of the stages' `attention_distance`, as `Objective.loss`."""
        total = teacher.maps[0].new_zeros((), dtype=None)
        for s, t in zip(student.maps, teacher.maps, strict=True):
            total = total + attention_distance(s.float(), t.float())
        return total


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """One stage of `Attention`: maps [B, C, H, W] of any widths and sizes."""
    s, t = same_size(student.square().mean(1, keepdim=True), teacher.square().mean(1, keepdim=True))
    return F.mse_loss(F.normalize(s.flatten(1)), F.normalize(t.flatten(1)))
