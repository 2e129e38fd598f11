"""Which of the student's queries is which of the teacher's."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

#: Weights of class, L1 and GIoU: those of Deformable DETR's matching with the objects.
COSTS = (2.0, 5.0, 2.0)


@torch.no_grad()
def match_queries(
    student: tuple[Tensor, Tensor | None], teacher: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Pair each image's queries so that the sum of costs between their predictions is least (the Hungarian method).

    Source: Carion et al., *End-to-End Object Detection with Transformers*, ECCV 2020, Eq. 1, with the teacher's
    predictions in the objects' place and the mean absolute difference of the classes' probabilities as their cost,
    weighted by the number of classes, at most 1.

    Args:
        student: boxes [B, N, 4] centre, width, height, and the classes' probabilities [B, N, C], or None.
        teacher: the same for M queries.

    Returns:
        Indices of student's and teacher's queries, [B, min(N, M)] each, in the order of the student's.

    Effects: waits for the device, as the assignment is made by scipy on the host.
    """
    boxes, their_boxes = student[0].float(), teacher[0].float()
    cost = COSTS[1] * torch.cdist(boxes, their_boxes, p=1)
    corners, their_corners = (box_convert(b, "cxcywh", "xyxy") for b in (boxes, their_boxes))
    cost -= COSTS[2] * torch.stack([generalized_box_iou(a, b) for a, b in zip(corners, their_corners, strict=True)])
    if student[1] is not None and teacher[1] is not None:
        cost += COSTS[0] * torch.cdist(student[1].float(), teacher[1].float(), p=1).clamp_max(1)
    # a prediction that is not finite is paired last
    cost = torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=1e6).cpu()
    pairs = [linear_sum_assignment(c) for c in cost.numpy()]
    device = boxes.device
    own, theirs = (torch.stack([torch.as_tensor(p[k]) for p in pairs]).to(device) for k in (0, 1))
    return own, theirs
