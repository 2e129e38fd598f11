"""What a student learns of how samples relate: distances and angles, contrast, similarity to a queue of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Objective
from .features import EPS
from .logits import kl
from .memory import Queue, of_all_ranks
from .projectors import PooledProjector, make_projector
from .taps import Outputs, Taps

#: Of distances and angles, as in the paper of RKD.
WEIGHTS = (25.0, 50.0)


class Relational(Objective):
    """RKD: 25 * distances + 50 * angles between the pooled features of a batch. Infimum 0. Nothing private.

    Reached where the student's features are the teacher's but for a rotation, a shift and a scale, so widths need not
    agree. Distances of pairs are divided by their mean over the batch; angles are the cosines at the second of each
    three samples; both are compared by Huber's loss. The batch is that of each rank; memory grows with its cube, some
    64 MiB each at 256. Below 3 samples there are no angles, below 2 nothing.

    Source: Park et al., *Relational Knowledge Distillation*, CVPR 2019, Eq. 5 to 9.
    """

    def __init__(self, name: str, pool: str) -> None:
        self.name = name
        self.student, self.teacher = Taps(logits=True, pooled=pool), Taps(pooled=pool)

    def loss(self, student: Outputs, projected: object, teacher: Outputs, target: Any) -> Tensor:
        """The weighted sum of `distances` and `angles`, as `Objective.loss`."""
        assert student.pooled is not None
        assert teacher.pooled is not None
        s, t = student.pooled.float(), teacher.pooled.float()
        parts = (F.smooth_l1_loss(of(s), of(t)) if len(s) > 1 else s.sum() * 0 for of in (distances, cosines))
        return sum((weight * part for weight, part in zip(WEIGHTS, parts, strict=True)), s.new_zeros(()))


def distances(rows: Tensor) -> Tensor:
    """[B, B] of rows [B, C], divided by the mean of those between different rows."""
    apart = _apart(rows)
    return apart / (apart.sum() / (len(rows) * (len(rows) - 1))).clamp_min(EPS)


def cosines(rows: Tensor) -> Tensor:
    """[j, i, k] of the angle at row j between rows i and k; 0 where row j is one of them or equals it."""
    rows = rows - rows.mean(0)  # as the products are differences of large numbers elsewhere
    products, apart = rows @ rows.mT, _apart(rows)
    from_j = products[None] - products[:, :, None] - products[:, None, :] + products.diagonal()[:, None, None]
    scale = torch.where(apart > EPS, 1 / apart.clamp_min(EPS), 0)
    return from_j * scale[:, :, None] * scale[:, None, :]


def _apart(rows: Tensor) -> Tensor:
    """[B, B] distances between rows. Their gradient is 0 where they are 0."""
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


class Contrastive(Objective):
    """A sample's own teacher feature among those of the batch: cross-entropy of cosines over T. It nears 0.

    The negatives are the other samples of all ranks' batches. Private: the projector.

    Source: Tian et al., *Contrastive Representation Distillation* (CRD), ICLR 2020, in the later form without memory:
    InfoNCE within the batch, as in Giakoumoglou and Stathaki, *Discriminative and Consistent Representation
    Distillation*, 2024, arXiv 2407.11802. CRD's own estimator keeps a feature of student and teacher for each image of
    the data set, and needs each image's number: it fits neither streams nor repeated augmentation nor several ranks,
    which would have different banks. Here the student's features go to the teacher's width, and the teacher's stay.
    """

    def __init__(self, name: str, projector: str, widths: tuple[int, int], pool: str, temperature: float) -> None:
        self.name, self.temperature = name, temperature
        self.head = PooledProjector(projector, *widths)
        self.student, self.teacher = Taps(logits=True, pooled=pool), Taps(pooled=pool)

    def loss(self, student: Outputs, projected: object, teacher: Outputs, target: Any) -> Tensor:
        """The cross-entropy, as `Objective.loss`."""
        assert isinstance(projected, Tensor)
        assert teacher.pooled is not None
        rows, own = F.normalize(teacher.pooled.float(), dim=1), F.normalize(projected, dim=1)
        everyone = of_all_ranks(rows)
        first = torch.distributed.get_rank() * len(rows) if len(everyone) > len(rows) else 0
        places = torch.arange(first, first + len(rows), device=rows.device)
        return F.cross_entropy(own @ everyone.mT / self.temperature, places)


class PseudoClassProjector(nn.Module):
    """The pooled features and the map of the student in the teacher's width, by a linear map each."""

    def __init__(self, kind: str, widths: tuple[int, int], map_widths: Sequence[int]) -> None:
        super().__init__()
        width, their_width = map_widths
        self.pooled, self.map = PooledProjector(kind, *widths), make_projector(kind, width, their_width)

    def forward(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """[B, width of the teacher's pooled features] and [B, width of its map, H, W]."""
        (found,) = outputs.maps
        return self.pooled(outputs), self.map(found.float().movedim(1, -1)).movedim(-1, 1)


class PseudoClass(Objective):
    """LightlyTrain's distillation: KL over pseudo-classes, plus KL over the places of the image. Infimum 0.

    Pseudo-classes are the teacher's pooled features of the last batches, kept in a `Queue`: the cosine with each,
    divided by the temperature, is a logit. Likewise in each image the cosines of each place of the last map with all
    others, the student's map resized to the teacher's grid. No labels, no classes. Private: both projectors.

    The queue has the features of all ranks, so it is the same on each; LightlyTrain's is each rank's own. The batch
    itself is in it before it is judged, as there. What is not filled yet is no class; there it is a class of logit 0.

    Source: the method `distillationv3` of LightlyTrain 0.15 (Lightly AG, 2026), weights 1 and 1, temperatures 0.07.

    Args:
        name: in logs.
        projector: "linear" or "orthogonal".
        widths: of the pooled features.
        map_widths: of the maps.
        stages: the last map of student and teacher.
        pool: of `Taps.pooled`.
        size: of the queue.
        temperature: of both softmaxes.
    """

    memory: Queue

    def __init__(
        self,
        name: str,
        projector: str,
        widths: tuple[int, int],
        map_widths: tuple[int, ...],
        stages: tuple[int, ...],
        pool: str,
        size: int,
        temperature: float,
    ) -> None:
        self.name, self.temperature = name, temperature
        self.head, self.memory = PseudoClassProjector(projector, widths, map_widths), Queue(size, widths[1])
        self.student = Taps(logits=True, pooled=pool, stages=stages[:1])
        self.teacher = Taps(pooled=pool, stages=stages[1:])

    def remember(self, teacher: Outputs) -> None:
        """Put the batch's features into the queue."""
        assert teacher.pooled is not None
        self.memory.push(teacher.pooled.float())

    def loss(self, student: Outputs, projected: object, teacher: Outputs, target: Any) -> Tensor:
        """The sum of both divergences, as `Objective.loss`; while the queue is empty the first is 0."""
        assert isinstance(projected, tuple)
        assert teacher.pooled is not None
        (found,), (pooled, own) = teacher.maps, projected
        s, t = (self.memory.logits(x.float(), self.temperature).log_softmax(-1) for x in (pooled, teacher.pooled))
        own = F.interpolate(own, found.shape[-2:], mode="bilinear", align_corners=False)
        return kl(s, t) + kl(self._places(own), self._places(found.float()))

    def _places(self, found: Tensor) -> Tensor:
        """[B * places, places]: logarithms of how alike each place is to all of its image."""
        tokens = F.normalize(found.flatten(2), dim=1)
        return (tokens.mT @ tokens / self.temperature).flatten(0, 1).log_softmax(-1)
