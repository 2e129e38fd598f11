"""What images made from a teacher should be: losses of their logits and pixels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..objectives.base import at_bound
from .statistics import BatchStatistics

#: The objectives of an image's maker, in their order.
NAMES = ("statistics", "confidence", "disagreement")


class ImageLosses:
    """The three losses of a batch of images, each a scalar.

    - statistics: `BatchStatistics`, and where there is one a prior on the pixels. Infimum 0.
    - confidence: cross-entropy between the teacher's logits and the classes the images are made for. Infimum 0.
    - disagreement: falls where student and teacher differ more: see `disagreement`.

    Args:
        teacher, student: from images [B, C, H, W], normalised for the student, to logits [B, classes]. No parameter of
            them needs a gradient.
        statistics: of the teacher.
        kind: of disagreement: "kl" or "js".
        logarithms: whether gradients of logarithms are balanced; "kl" is then exp(-KL), whose logarithm is -KL.
        prior: of normalised images to a scalar that is added to statistics; None for none.
    """

    def __init__(
        self,
        teacher: Callable[[Tensor], Tensor],
        student: Callable[[Tensor], Tensor],
        statistics: BatchStatistics,
        kind: str = "kl",
        logarithms: bool = False,
        prior: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._teacher, self._student, self.statistics = teacher, student, statistics
        self._kind, self._logarithms, self._prior = kind, logarithms, prior

    def __call__(self, images: Tensor, labels: Tensor, prior_of: Tensor | None = None) -> dict[str, Tensor]:
        """By name; call it inside `with statistics`.

        Args:
            images: [B, C, H, W], normalised for the student.
            labels: [B], the classes they are made for.
            prior_of: what the prior looks at; default: the images.
        """
        theirs = self._teacher(images).float()
        statistics = self.statistics.take()
        if self._prior is not None:
            statistics = statistics + self._prior(images if prior_of is None else prior_of)
        own = self._student(images).float()
        apart = disagreement(own, theirs, self._kind, self._logarithms)
        if self._kind == "js" or self._logarithms:
            apart = at_bound(apart)
        values = (at_bound(statistics), at_bound(F.cross_entropy(theirs, labels)), apart)
        return dict(zip(NAMES, values, strict=True))


def disagreement(student: Tensor, teacher: Tensor, kind: str = "kl", logarithms: bool = False) -> Tensor:
    """A loss that falls where student and teacher differ more.

    "kl": minus the mean of KL(teacher || student) over the images that both give the same class, 0 for the others (they
    differ enough); without a lower bound. Source: Fast-DFKD (Fang et al., AAAI 2022), Eq. 5 and their code. As
    exp(-KL), in (0, 1], its log-gradient is the gradient of -KL.
    "js": 1 - JS(teacher, student) / log 2, in [0, 1]. Source: DeepInversion (Yin et al., CVPR 2020), Eq. 8.

    Args:
        student, teacher: logits [B, classes].
        kind: which of them.
        logarithms: whether "kl" is exp(-KL).
    """
    log_s, log_t = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    if kind == "kl":
        same = (student.argmax(-1) == teacher.argmax(-1)).float()
        apart = (F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1) * same).mean()
        return (-apart).exp() if logarithms else -apart
    middle = torch.logaddexp(log_s, log_t) - math.log(2)
    to_both = [F.kl_div(middle, log, reduction="batchmean", log_target=True) for log in (log_s, log_t)]
    return 1 - torch.stack(to_both).mean() / math.log(2)


def pixel_prior(variation: float, length: float) -> Callable[[Tensor], Tensor]:
    """A prior on pixels: total variation, and the mean square.

    Source: DeepInversion (Yin et al., CVPR 2020), Eq. 3. Means here, so that the numbers hold for any size.

    Args:
        variation: factor of the mean squared difference of neighbouring pixels.
        length: factor of the mean square of pixels.
    """

    def prior(images: Tensor) -> Tensor:
        down, right = images.diff(dim=-2), images.diff(dim=-1)
        return variation * (down.square().mean() + right.square().mean()) + length * images.square().mean()

    return prior
