"""What a student detector imitates besides feature maps: tokens, and predictions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss

from .base import Objective
from .features import DISTANCES, EPS, map_distances, normalise
from .projectors import MapProjector, make_projector
from .taps import Outputs, Taps

#: Of L1 and GIoU between matched boxes, as in the task loss of the DETR family.
BOX_WEIGHTS = (5.0, 2.0)


class TokenProjector(nn.Module):
    """One linear map per level, one for the tokens of body and neck each: the same outputs in the teacher's widths."""

    def __init__(self, kind: str, widths: tuple[list[int], list[int]], tokens: tuple[int, int]) -> None:
        super().__init__()
        self.levels = MapProjector(kind, *widths)
        self.body, self.neck = make_projector(kind, *tokens), make_projector(kind, *tokens)

    def forward(self, outputs: Outputs) -> Outputs:
        """Projected maps, body and neck; what there is not stays None."""
        body = None if outputs.body is None else self.body(outputs.body.float())
        neck = None if outputs.neck is None else self.neck(outputs.neck.float())
        return outputs._replace(maps=tuple(self.levels(outputs)), body=body, neck=neck)


class Tokens(Objective):
    """ViDT's token matching: S = sum over levels D(p_s, p_t) + D(body_s, body_t) + sum over layers D(neck_s, neck_t).

    p are the patch tokens of a level, body the detection tokens after their first look at the image, neck those after
    each later decoder layer (`Outputs`); D a mean over rows. What one side does not have is left out.

    Source: Song et al., *ViDT*, ICLR 2022, Sec. 3.3, as their code computes it (methods/vidt/criterion.py): D the mean
    L2 norm of a row's difference, `distance="norm"`. Miles et al., *VkD*, CVPR 2024, for detection: an orthogonal
    projector, both sides standardised per channel, `distance="smooth_l1"`. Their projector's learned scale and bias per
    channel are left out: but for a sign the standardisation takes both away again.

    Args:
        name: in logs.
        projector: "linear" or "orthogonal".
        stages: the levels to compare, of student and teacher.
        widths: their channels.
        token_widths: of the detection tokens.
        norm: of `features.normalise`.
        distance: of `features.DISTANCES`.
        root: return sqrt(S + eps^2) - eps, as ViDT's code has the root. Its gradient would be infinite at S = 0, hence
            eps. Off by default: VkD has none, and with log-gradients the root only halves this objective's,
            grad log sqrt(S) = grad log S / 2, which moves the weights and not the direction.
    """

    def __init__(
        self,
        name: str,
        projector: str,
        stages: tuple[tuple[int, ...], tuple[int, ...]],
        widths: tuple[list[int], list[int]],
        token_widths: tuple[int, int],
        norm: str,
        distance: str,
        root: bool,
    ) -> None:
        self.name, self.norm, self.distance, self.root = name, norm, DISTANCES[distance], root
        self.head = TokenProjector(projector, widths, token_widths)
        self.student, self.teacher = Taps(stages=stages[0]), Taps(stages=stages[1])

    def loss(self, student: Outputs, projected: object, teacher: Outputs, target: Any) -> Tensor:
        """S, or with `root` its root, as `Objective.loss`."""
        assert isinstance(projected, Outputs)
        terms = map_distances(projected.maps, teacher.maps, self.norm, self.distance)
        if projected.body is not None and teacher.body is not None:
            terms.append(self._tokens(projected.body, teacher.body))
        if projected.neck is not None and teacher.neck is not None:
            layers = min(projected.neck.shape[1], teacher.neck.shape[1])
            for i in range(1, layers + 1):  # the last ones
                terms.append(self._tokens(projected.neck[:, -i], teacher.neck[:, -i]))
        total = torch.stack(terms).sum()
        return (total + EPS**2).sqrt() - EPS if self.root else total

    def _tokens(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = normalise(student.flatten(0, 1), teacher.float().flatten(0, 1), self.norm)
        return self.distance(s, t)


class Predictions(Objective):
    """Classes and boxes, each place or query weighted by how sure the teacher is of an object there.

    With w the teacher's highest class probability: (sum w KL(classes) + sum w D(boxes)) / sum w. KL is that of
    Bernoulli variables, one per class: its infimum is 0 (a cross-entropy's is the teacher's entropy). D: of dense
    detectors smooth L1 between what the box coder decodes, and the KL of the centerness; of queries
    5 L1 + 2 (1 - GIoU).

    Source: Du et al., *Distilling Object Detectors with Feature Richness*, NeurIPS 2021, Eq. 5 and 6, for the weights.

    Args:
        name: in logs.
        dense: of which kind both detectors are.
        columns: [classes] the teacher's class for each of the student's.
        softmax: the teacher's logits are those of a softmax with "no object" as last class; otherwise log-odds.
    """

    def __init__(self, name: str, dense: bool, columns: Tensor, softmax: bool = False) -> None:
        self.name, self.dense, self.columns, self.softmax = name, dense, columns, softmax

    def loss(self, student: Outputs, projected: object, teacher: Outputs, target: Any) -> Tensor:
        """The weighted mean over places, or over pairs of queries, as `Objective.loss`."""
        assert student.logits is not None
        assert student.boxes is not None
        assert teacher.logits is not None
        assert teacher.boxes is not None
        logits, boxes, their_boxes = student.logits, student.boxes, teacher.boxes
        their_logits = self._log_odds(teacher.logits)
        weights = self.sureness(teacher)
        terms = bernoulli_kl(logits, their_logits).sum(-1)
        if self.dense:
            terms = terms + F.smooth_l1_loss(boxes, their_boxes, reduction="none").sum(-1)
            if student.quality is not None and teacher.quality is not None:
                terms = terms + bernoulli_kl(student.quality, teacher.quality)
        else:
            apart = (boxes - their_boxes).abs().sum(-1)
            corners, their_corners = (box_convert(b, "cxcywh", "xyxy") for b in (boxes, their_boxes))
            terms = terms + BOX_WEIGHTS[0] * apart + BOX_WEIGHTS[1] * generalized_box_iou_loss(corners, their_corners)
        # the divergences and 1 - GIoU round to less than 0 where both agree
        return ((weights * terms).sum() / weights.sum().clamp_min(EPS)).clamp_min(0)

    def sureness(self, teacher: Outputs) -> Tensor:
        """[B, N], the teacher's highest probability of a class: the weight of a place or query."""
        assert teacher.logits is not None
        return self._log_odds(teacher.logits).sigmoid().amax(-1)

    def _log_odds(self, logits: Tensor) -> Tensor:
        """Of the student's classes; those of a softmax as a student with one score per class reads them."""
        odds = torch.logit(logits.softmax(-1)[..., :-1], eps=EPS) if self.softmax else logits
        return odds[..., self.columns.to(logits.device)]


def bernoulli_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of Bernoulli variables given by their log-odds, elementwise; 0 at equal ones."""
    p = teacher.sigmoid()
    # both logarithms from log-odds: log p is exact where p rounds to 0 or 1
    positive = p * (F.logsigmoid(teacher) - F.logsigmoid(student))
    return positive + (1 - p) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
