"""What a student detector imitates: tokens, feature maps, predictions. Each loss has infimum 0."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss

from ..objectives.features import DISTANCES, normalise, same_size
from ..objectives.projectors import make_projector
from .batch import Outputs
from .matching import pick

#: Under the roots: the gradient of a norm is finite at 0 too.
EPS = 1e-6
#: Of L1 and GIoU between matched boxes, as in the task loss of the DETR family.
BOX_WEIGHTS = (5.0, 2.0)


def row_norm(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of the L2 norm of a row's difference; channels are dimension 1.

    The norm is sqrt(|d|^2 + eps^2) - eps: 0 at equal rows, with a finite gradient there, which the plain norm has not.
    """
    return ((student - teacher).square().sum(1) + EPS**2).sqrt().sub(EPS).mean()


#: As of images' features, and ViDT's.
TOKEN_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {**DISTANCES, "norm": row_norm}


class Objective:
    """One loss between student and teacher.

    Attributes:
        name: in logs.
        head: trainable module on the student's `Outputs`, or None; private to this objective.
    """

    name: str
    head: nn.Module | None = None

    def loss(
        self, student: Outputs, projected: object, teacher: Outputs, pairs: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The loss, a scalar, float32, with infimum 0; a value that rounding may take below 0 is brought to 0 here.

        Args:
            student: its outputs.
            projected: what `head` made of them.
            teacher: its outputs, detached.
            pairs: of `match_queries`; None to compare by index.
        """
        raise NotImplementedError


class Projectors(nn.Module):
    """One linear map per feature level, one for the tokens of body and neck each; student's to teacher's width."""

    def __init__(self, kind: str, widths: list[tuple[int, int]], tokens: tuple[int, int] | None) -> None:
        super().__init__()
        self.maps = nn.ModuleList([make_projector(kind, *pair) for pair in widths])
        self.body = None if tokens is None else make_projector(kind, *tokens)
        self.neck = None if tokens is None else make_projector(kind, *tokens)

    def forward(self, outputs: Outputs) -> Outputs:
        """The same outputs in the teacher's widths; maps are the last ones."""
        chosen = outputs.maps[len(outputs.maps) - len(self.maps) :]
        maps = [p(m.float().movedim(1, -1)).movedim(-1, 1) for p, m in zip(self.maps, chosen, strict=True)]
        body = None if outputs.body is None or self.body is None else self.body(outputs.body.float())
        neck = None if outputs.neck is None or self.neck is None else self.neck(outputs.neck.float())
        return outputs._replace(maps=tuple(maps), body=body, neck=neck)


class Features(Objective):
    """Mean over the levels of the distance between projected maps and the teacher's; coarsest levels are compared.

    For FPN levels as for a transformer's patch features. Source: Romero et al., *FitNets*, ICLR 2015, at each level.
    """

    def __init__(self, name: str, projector: str, widths: list[tuple[int, int]], norm: str, distance: str) -> None:
        self.name, self.norm, self.distance = name, norm, TOKEN_DISTANCES[distance]
        self.head = Projectors(projector, widths, None)

    def loss(
        self, student: Outputs, projected: object, teacher: Outputs, pairs: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The mean over the maps of their distance; a scalar, float32. `pairs` is not used."""
        assert isinstance(projected, Outputs)
        terms = _levels(projected.maps, teacher.maps, self.norm, self.distance)
        return torch.stack(terms).mean()


class Tokens(Objective):
    """ViDT's token matching: S = sum over levels D(p_s, p_t) + D(body_s, body_t) + sum over layers D(neck_s, neck_t).

    p are the patch tokens of a level, body the detection tokens after their first look at the image, neck those after
    each later decoder layer (`batch.Outputs`); D a mean over rows. What one side does not have is left out.

    Source: Song et al., *ViDT*, ICLR 2022, Sec. 3.3, as their code computes it (methods/vidt/criterion.py): D the mean
    L2 norm of a row's difference, `distance="norm"`. Miles et al., *VkD*, CVPR 2024, for detection: an orthogonal
    projector, both sides standardised per channel, `distance="smooth_l1"`. Their projector's learned scale and bias per
    channel are left out: but for a sign the standardisation takes both away again.

    Args:
        name: in logs.
        projector: "linear" or "orthogonal".
        widths: of student and teacher, of the compared levels.
        token_widths: of the detection tokens.
        norm: of `objectives.features.normalise`.
        distance: of `TOKEN_DISTANCES`.
        root: return sqrt(S + eps^2) - eps, as ViDT's code has the root. Its gradient would be infinite at S = 0, hence
            eps. Off by default: VkD has none, and with log-gradients the root only halves this objective's,
            grad log sqrt(S) = grad log S / 2, which moves the weights and not the direction.
    """

    def __init__(
        self,
        name: str,
        projector: str,
        widths: list[tuple[int, int]],
        token_widths: tuple[int, int],
        norm: str,
        distance: str,
        root: bool,
    ) -> None:
        self.name, self.norm, self.distance, self.root = name, norm, TOKEN_DISTANCES[distance], root
        self.head = Projectors(projector, widths, token_widths)

    def loss(
        self, student: Outputs, projected: object, teacher: Outputs, pairs: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """S, or with `root` its root; a scalar, float32.

        Raises:
            ValueError: by index, but the numbers of queries differ.
        """
        assert isinstance(projected, Outputs)
        terms = _levels(projected.maps, teacher.maps, self.norm, self.distance)
        if projected.body is not None and teacher.body is not None:
            terms.append(self._tokens(projected.body, teacher.body, pairs))
        if projected.neck is not None and teacher.neck is not None:
            layers = min(projected.neck.shape[1], teacher.neck.shape[1])
            for i in range(1, layers + 1):  # the last ones
                terms.append(self._tokens(projected.neck[:, -i], teacher.neck[:, -i], pairs))
        total = torch.stack(terms).sum()
        return (total + EPS**2).sqrt() - EPS if self.root else total

    def _tokens(self, student: Tensor, teacher: Tensor, pairs: tuple[Tensor, Tensor] | None) -> Tensor:
        if pairs is not None:
            student, teacher = pick(student, pairs[0]), pick(teacher, pairs[1])
        s, t = normalise(student.flatten(0, 1), teacher.float().flatten(0, 1), self.norm)
        return self.distance(s, t)


def _levels(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], norm: str, distance: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    count = min(len(student), len(teacher))
    pairs = zip(student[len(student) - count :], teacher[len(teacher) - count :], strict=True)
    return [distance(*normalise(*same_size(s, t.float()), norm)) for s, t in pairs]


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
    """

    def __init__(self, name: str, dense: bool, columns: Tensor) -> None:
        self.name, self.dense, self.columns = name, dense, columns

    def loss(
        self, student: Outputs, projected: object, teacher: Outputs, pairs: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The weighted mean over places, or over pairs of queries; a scalar, float32, not below 0.

        The teacher's logits are log-odds (`as_odds`).
        """
        logits, boxes = student.logits.float(), student.boxes.float()
        their_logits = teacher.logits[..., self.columns.to(logits.device)]
        their_boxes = teacher.boxes
        if pairs is not None:
            logits, boxes = pick(logits, pairs[0]), pick(boxes, pairs[0])
            their_logits, their_boxes = pick(their_logits, pairs[1]), pick(their_boxes, pairs[1])
        weights = their_logits.sigmoid().amax(-1)
        terms = bernoulli_kl(logits, their_logits).sum(-1)
        if self.dense:
            terms = terms + F.smooth_l1_loss(boxes, their_boxes, reduction="none").sum(-1)
            if student.quality is not None and teacher.quality is not None:
                terms = terms + bernoulli_kl(student.quality.float(), teacher.quality)
        else:
            apart = (boxes - their_boxes).abs().sum(-1)
            corners, their_corners = (box_convert(b, "cxcywh", "xyxy") for b in (boxes, their_boxes))
            terms = terms + BOX_WEIGHTS[0] * apart + BOX_WEIGHTS[1] * generalized_box_iou_loss(corners, their_corners)
        # the divergences and 1 - GIoU round to less than 0 where both agree
        return ((weights * terms).sum() / weights.sum().clamp_min(EPS)).clamp_min(0)


def bernoulli_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of Bernoulli variables given by their log-odds, elementwise; 0 at equal ones."""
    p = teacher.sigmoid()
    # both logarithms from log-odds: log p is exact where p rounds to 0 or 1
    positive = p * (F.logsigmoid(teacher) - F.logsigmoid(student))
    return positive + (1 - p) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))


def as_odds(probabilities: Tensor) -> Tensor:
    """Log-odds of probabilities: a softmax teacher's classes as a student with one score per class reads them."""
    return torch.logit(probabilities, eps=EPS)
